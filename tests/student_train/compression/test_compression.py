"""Dropping tokens is running the remaining layers on what is left, with original positions."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from student_train.compression.compression import compress
from student_train.compression.decoder import decoder_of
from student_train.config.compression import CompressionSettings, DropStage
from student_train.models.forward import final_hidden
from teacher_cache.encoding.collate import EncodedSample
from tests.support.deep import at, batch_of, compressed, deep_batch, deep_model, encode
from tests.support.paths import TinyFolder

COMPRESSORS = ("dart", "fastv", "random")
FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl", "idefics3")
MODELS = [
    *((f, None) for f in FAMILIES),
    ("llava", "llama"),
    ("llava", "mistral"),
    ("llava", "qwen3"),
    ("qwen2_5_vl", "qwen2_vl"),
]
PYRAMID = (DropStage(layer=1, ratio=0.25), DropStage(layer=3, ratio=0.5))


@torch.no_grad()
def by_hand(model: Any, sample: EncodedSample, kept: dict[int, Tensor]) -> Tensor:
    """Final states of one sample, alone: before layer k only the positions `kept[k]` go on."""
    decoder = decoder_of(model)
    inputs: dict[str, Any] = {}

    def catch(_module: Any, args: Any, kwargs: Any) -> None:
        inputs.update(kwargs, hidden=args[0])

    hook = decoder.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    model(**batch_of([sample]).inputs, use_cache=False)
    hook.remove()
    hidden, (cos, sin) = inputs["hidden"], inputs["position_embeddings"]
    here = torch.arange(sample.num_tokens)
    for number, layer in enumerate(decoder.layers):
        if number in kept:
            rows = torch.tensor([here.tolist().index(place) for place in kept[number].tolist()])
            hidden, cos, sin = hidden[:, rows], cos[:, rows], sin[:, rows]
            here = kept[number]
        causal = hidden.new_full((len(here), len(here)), -torch.inf).triu(1)[None, None]
        hidden = layer(hidden, attention_mask=causal, position_embeddings=(cos, sin))
    return decoder.norm(hidden)[0]


@pytest.mark.parametrize(("family", "decoder"), MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_each_samples_remaining_layers_on_its_own_kept_tokens(
    family: str, decoder: str | None, side: Literal["left", "right"], tiny_folder: TinyFolder
) -> None:
    model, batch = deep_batch(tiny_folder(family), side, decoder=decoder)
    for compressor in COMPRESSORS:
        settings = at(0.5, compressor)
        hidden, layout = compressed(model, settings, batch)
        for row, sample in enumerate(batch.samples):
            kept = layout.rows[row]
            vision = sample.spans.vision
            text = torch.arange(sample.num_tokens)
            text = text[~torch.isin(text, vision)]
            assert bool(layout.kept(row, text).all())
            assert (len(kept) < sample.num_tokens) == (len(vision) > 0)
            wanted = by_hand(model, sample, {2: kept})
            states = hidden[row, layout.columns(row, kept)]
            torch.testing.assert_close(states, wanted, rtol=0, atol=5e-6)
            states, alone = compressed(model, settings, batch_of([sample]))
            assert alone.rows[0].tolist() == kept.tolist()
            torch.testing.assert_close(states[0], wanted, rtol=0, atol=5e-6)


def test_in_double_precision_the_difference_is_rounding(tiny_folder: TinyFolder) -> None:
    model, batch = deep_batch(tiny_folder("qwen2_5_vl"))
    hidden, layout = compressed(model.double(), at(0.5), batch)
    for row, sample in enumerate(batch.samples):
        kept = layout.rows[row]
        states = hidden[row, layout.columns(row, kept)]
        torch.testing.assert_close(states, by_hand(model, sample, {2: kept}), rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pyramid_drops_at_each_stage_a_share_of_what_is_left(attention: str, llava: Path) -> None:
    model, batch = deep_batch(llava, "left", attention=attention)
    both = CompressionSettings(compressor="fastv", stages=PYRAMID)
    _, first = compressed(model, replace(both, stages=PYRAMID[:1]), batch)
    hidden, last = compressed(model, both, batch)
    for row, sample in enumerate(batch.samples):
        vision = sample.spans.vision
        kept = last.rows[row]
        assert int(first.kept(row, vision).sum()) == len(vision) * 3 // 4
        assert int(last.kept(row, vision).sum()) == len(vision) * 3 // 8
        assert bool(first.kept(row, kept).all())
        wanted = by_hand(model, sample, {1: first.rows[row], 3: kept})
        states = hidden[row, last.columns(row, kept)]
        torch.testing.assert_close(states, wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_at_ratio_0_and_behind_the_last_layer_not_a_bit_changes(
    compressor: str, tiny_folder: TinyFolder
) -> None:
    model, batch = deep_batch(tiny_folder("llava_next"))
    with torch.no_grad():
        untouched = final_hidden(model, batch.inputs)
        for settings in (at(0.0, compressor), at(0.75, compressor, layer=4)):
            hidden, layout = compressed(model, settings, batch)
            assert torch.equal(hidden, untouched)
            assert bool((layout.is_token == batch.inputs["attention_mask"].bool()).all())


def test_text_alone_is_untouched_to_the_bit(llava: Path) -> None:
    model, processor = deep_model(llava)
    batch = batch_of([encode(model, processor)[2]])
    with torch.no_grad():
        untouched = final_hidden(model, batch.inputs)
    assert torch.equal(compressed(model, at(0.9), batch)[0], untouched)


def test_afterwards_the_model_is_as_before_also_when_the_pass_failed(
    llava: Path,
) -> None:
    model, batch = deep_batch(llava)
    names = list(model.state_dict())
    with torch.no_grad():
        untouched = final_hidden(model, batch.inputs)  # puts transformers' own hooks in place
        hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
        with compress(model, at(0.5), batch):
            assert not torch.equal(final_hidden(model, batch.inputs), untouched)
            assert list(model.state_dict()) == names
        with pytest.raises(RuntimeError, match="stop"), compress(model, at(0.5), batch):
            raise RuntimeError("stop")
        assert torch.equal(final_hidden(model, batch.inputs), untouched)
    after = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    assert after == hooks
