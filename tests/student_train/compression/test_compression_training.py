"""Training under compression: gradients, checkpointing, kernels, students on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from student_train.compression.compression import compress
from student_train.config.compression import CompressionSettings, DropStage
from student_train.models.forward import final_hidden, output_head
from teacher_cache.encoding.collate import ModelBatch
from tests.support.deep import at, batch_of, compressed, deep_batch, deep_model, encode
from tests.support.lazy import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForImageTextToText,
    flash_attention_mask,
    student_from_vanilla,
)
from tests.support.paths import TinyFolder
from tests.support.tiny import tiny_samples

PYRAMID = (DropStage(layer=1, ratio=0.25), DropStage(layer=3, ratio=0.5))


def pyramid(compressor: str) -> CompressionSettings:
    return CompressionSettings(compressor=compressor, stages=PYRAMID)


def gradients(
    model: Any, batch: ModelBatch, compressor: str, checkpointing: bool, inside: bool = False
) -> dict[str, Tensor]:
    """Gradients of a made-up loss of the kept tokens; the context may close before `backward`."""
    model.train().zero_grad()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()
    with compress(model, pyramid(compressor), batch) as found:
        hidden = final_hidden(model, batch.inputs)
        loss = (hidden.pow(3) * found.layout.is_token[:, :, None]).sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("compressor", ["dart", "fastv", "random"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_checkpointing_changes_no_gradient(
    family: str, compressor: str, tiny_folder: TinyFolder
) -> None:
    model, batch = deep_batch(tiny_folder(family))
    plain = gradients(model, batch, compressor, checkpointing=False)
    assert sum(1 for n in plain if ".layers.3." in n) > 5
    for inside in (False, True):
        checkpointed = gradients(model, batch, compressor, checkpointing=True, inside=inside)
        assert plain.keys() == checkpointed.keys()
        for name, gradient in plain.items():
            assert torch.equal(gradient, checkpointed[name]), name
            assert bool(torch.isfinite(gradient).all()), name


def test_dropped_tokens_have_no_gradient_behind_the_stage(llava: Path) -> None:
    """Only through the layers below, as keys and values of tokens that stay."""
    model, processor = deep_model(llava)
    batch = batch_of(encode(model, processor, tiny_samples(1)))
    seen: list[Tensor] = []

    def keep_gradient(_module: Any, args: Any) -> None:
        args[0].retain_grad()
        seen.append(args[0])

    hook = model.get_decoder().layers[2].register_forward_pre_hook(keep_gradient)
    with compress(model, at(0.75, "fastv"), batch) as found:
        final_hidden(model, batch.inputs).sum().backward()
    hook.remove()
    dropped = ~found.layout.kept(0, torch.arange(batch.samples[0].num_tokens))
    assert int(dropped.sum()) == 12
    assert seen[0].grad is not None
    assert bool((seen[0].grad[0, dropped] == 0).all())
    assert bool((seen[0].grad[0, ~dropped] != 0).any())


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_student_with_few_tokens_is_compressed_too_and_saved_as_it_was(
    family: str, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    loaded: Any = student_from_vanilla(str(tiny_folder(family)), stride=2)
    student, processor = loaded
    batch = batch_of(encode(student, processor))
    shapes = {name: tuple(weight.shape) for name, weight in student.state_dict().items()}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    with compress(student, at(0.75, layer=1), batch):
        final_hidden(student, batch.inputs).pow(2).mean().backward()
        optimizer.step()
        student.save_pretrained(tmp_path)
    again: Any = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert {name: tuple(weight.shape) for name, weight in again.state_dict().items()} == shapes
    with torch.no_grad():
        expected = final_hidden(student.eval(), batch.inputs)
        assert torch.equal(final_hidden(again, batch.inputs), expected)
        for ratio in (0.25, 0.9):
            hidden, layout = compressed(again, at(ratio, "random", layer=1), batch)
            assert hidden.shape[1] == layout.length < expected.shape[1]
            assert output_head(again)(hidden).shape[:2] == hidden.shape[:2]


def by_lengths(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Like flash kernels: a 2-D mask or none, real tokens only, no position ids with gaps."""
    if (positions := options.get("position_ids")) is not None:
        assert positions.shape[-1] == query.shape[2]
        assert bool((positions.diff(dim=-1) == 1).all())
    groups = module.num_key_value_groups
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    output = torch.zeros_like(query)
    for row in range(len(query)):
        real = torch.arange(key.shape[2])
        if attention_mask is not None:
            assert attention_mask.ndim == 2
            real = attention_mask[row].nonzero()[:, 0]
        states = [x[row : row + 1, :, real] for x in (query, key, value)]
        output[row, :, real] = functional.scaled_dot_product_attention(
            states[0], states[1], states[2], is_causal=True, scale=options["scaling"]
        )[0]
    return output.transpose(1, 2), None


@pytest.mark.parametrize("compressor", ["dart", "fastv", "random"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_kernel_that_takes_lengths_instead_of_masks_gives_the_same(
    family: str, compressor: str, tiny_folder: TinyFolder
) -> None:
    AttentionInterface.register("by_lengths", by_lengths)
    AttentionMaskInterface.register("by_lengths", flash_attention_mask)
    model, batch = deep_batch(tiny_folder(family), "left")
    outputs: list[Tensor] = []
    for attention in ("sdpa", "by_lengths"):
        model.get_decoder().set_attn_implementation(attention)
        hidden, layout = compressed(model, pyramid(compressor), batch)
        outputs.append(hidden[layout.is_token])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=5e-6)
