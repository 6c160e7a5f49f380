"""Generating with compression: a short cache behind the stage, the same answers as without one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.student.generation import Generator
from student_train.compression.compression import compress
from student_train.config.compression import CompressionSettings, DropStage
from teacher_cache.encoding.collate import ModelBatch, collate
from teacher_cache.encoding.sample_encoder import SampleEncoder
from tests.support.deep import at, batch_of, deep_model, encode
from tests.support.lazy import DynamicCache, StaticCache
from tests.support.paths import TinyFolder
from tests.support.tiny import tiny_samples

NUM_NEW = 6
PYRAMID = (DropStage(layer=1, ratio=0.5), DropStage(layer=3, ratio=0.75))
CASES = [
    ("llava", None, "dart"),
    ("llava", None, "fastv"),
    ("llava", None, "random"),
    ("llava_next", None, "dart"),
    ("llava_onevision", None, "fastv"),
    ("qwen2_5_vl", None, "dart"),
    ("qwen2_5_vl", None, "fastv"),
    ("internvl", None, "random"),
    ("idefics3", None, "fastv"),
    ("llava", "mistral", "dart"),
    ("llava", "qwen3", "fastv"),
    ("qwen2_5_vl", "qwen2_vl", "fastv"),
]


def prompts(model: Any, processor: Any) -> ModelBatch:
    encoder = SampleEncoder(processor, model.config)
    return collate([encoder.encode_prompt(sample) for sample in tiny_samples(5)], 0, "left")


def generate(model: Any, batch: ModelBatch, **options: Any) -> Any:
    return model.generate(
        **batch.inputs,
        max_new_tokens=NUM_NEW,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize(("family", "decoder", "compressor"), CASES)
def test_a_cache_changes_no_answer(
    family: str, decoder: str | None, compressor: str, tiny_folder: TinyFolder
) -> None:
    model, processor = deep_model(tiny_folder(family), decoder)
    batch = prompts(model, processor)
    settings = CompressionSettings(compressor=compressor, stages=PYRAMID)
    with compress(model, settings, batch) as found:
        cached = generate(model, batch)
        lengths = [cached.past_key_values.get_seq_length(layer) for layer in range(4)]
        short = found.layout
        recomputed = generate(model, batch, use_cache=False)
    assert cached.sequences.tolist() == recomputed.sequences.tolist()
    for one, other in zip(cached.logits, recomputed.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    # The last token that was generated is in no cache yet.
    whole = batch.inputs["input_ids"].shape[1] + NUM_NEW - 1
    assert lengths[0] == whole
    assert whole > lengths[1] == lengths[2] >= lengths[3] == short.length + NUM_NEW - 1
    plain = generate(model, batch)
    assert any(not torch.equal(a, b) for a, b in zip(plain.logits, cached.logits, strict=True))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_answers_in_a_batch_are_those_one_by_one(family: str, tiny_folder: TinyFolder) -> None:
    model, processor = deep_model(tiny_folder(family))
    batch = prompts(model, processor)
    settings = CompressionSettings(compressor="fastv", stages=PYRAMID)
    generator = Generator(model, processor, None, NUM_NEW)
    with compress(model, settings, batch):
        together = generator.answers(batch.samples, [-1])
    for sample, answer in zip(batch.samples, together, strict=True):
        with compress(model, settings, batch_of([sample], "left")):
            assert generator.answers([sample], [-1]) == [answer]


def test_at_ratio_0_generation_is_the_uncompressed_models(tiny_folder: TinyFolder) -> None:
    model, processor = deep_model(tiny_folder("llava_next"))
    batch = prompts(model, processor)
    plain = generate(model, batch)
    with compress(model, at(0.0, "fastv"), batch):
        compressed = generate(model, batch)
    for one, other in zip(plain.logits, compressed.logits, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def decode(model: Any, batch: ModelBatch, cache: Any, tokens: Tensor) -> Tensor:
    """Logits of a prompt and of tokens after it, one by one, through a cache."""
    mask = batch.inputs["attention_mask"]
    outputs = [model(**batch.inputs, past_key_values=cache, use_cache=True).logits[:, -1]]
    for token in tokens.T:
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        step = model(
            input_ids=token[:, None], attention_mask=mask, past_key_values=cache, use_cache=True
        )
        outputs.append(step.logits[:, -1])
    return torch.stack(outputs)


def test_a_static_cache_gives_what_a_growing_one_gives(llava: Path) -> None:
    model, processor = deep_model(llava)
    batch = prompts(model, processor)
    settings = CompressionSettings(compressor="dart", stages=PYRAMID)
    tokens = torch.randint(3, 60, (5, 3), generator=torch.Generator().manual_seed(0))
    config = model.config.text_config
    with compress(model, settings, batch):
        growing = decode(model, batch, DynamicCache(config=config), tokens)
        static = decode(model, batch, StaticCache(config=config, max_cache_len=200), tokens)
    torch.testing.assert_close(static, growing, rtol=0, atol=1e-5)


def test_passes_that_are_not_of_the_batch_are_refused(llava: Path) -> None:
    model, processor = deep_model(llava)
    batch = prompts(model, processor)
    settings = at(0.5)
    with torch.no_grad():
        foreign = model(**batch.inputs, use_cache=True).past_key_values
    ids = torch.full((5, 1), 3)
    with compress(model, settings, batch), torch.no_grad():
        with pytest.raises(ValueError, match=r"runs on 10 rows, .* a batch of 5"):
            generate(model, batch, num_beams=2)
        with pytest.raises(ValueError, match="cache that was not filled in this context"):
            model(input_ids=ids, past_key_values=foreign, use_cache=True)
        with pytest.raises(ValueError, match="runs on 1 tokens of rows that have"):
            model(input_ids=ids)
    right = batch_of(encode(model, processor), "right")
    with compress(model, settings, right), pytest.raises(ValueError, match="side='left'"):
        generate(model, right, use_cache=False)
