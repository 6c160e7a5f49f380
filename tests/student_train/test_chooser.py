"""What decides which tokens go on: the sample's own question, and the draw."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from student_train.compression import compress
from student_train.stages import CompressionSettings, Stage
from student_train.student import final_hidden
from teacher_cache.schema import Message, Sample, make_sample
from teacher_cache.tokens import SampleEncoder
from tests.conftest import TinyFolder
from tests.deep import batch_of, deep_model, encode
from tests.tiny import tiny_samples


def answered(answer: str) -> Sample:
    sample = tiny_samples(1)[0]
    messages = [sample.messages[0], Message(role="assistant", text=answer)]
    return make_sample("asked", sample.images, messages)


def kept_vision(
    model: Any, samples: Sequence[Any], settings: CompressionSettings, draw: int = 0
) -> list[list[int]]:
    batch = batch_of(samples)
    with compress(model, settings, batch, draw) as found, torch.no_grad():
        final_hidden(model, batch.inputs)
    return [
        sample.spans.vision[found.layout.kept(row, sample.spans.vision)].tolist()
        for row, sample in enumerate(samples)
    ]


@pytest.mark.parametrize("compressor", ["dart", "fastv"])
def test_the_answer_decides_nothing_unless_the_released_way_is_asked_for(
    compressor: str, tiny_folder: TinyFolder
) -> None:
    model, processor = deep_model(tiny_folder("llava_next"))
    encoder = SampleEncoder(processor, model.config)
    answers = ["a red square, one digit.", "two digits.", "describe the picture: blue, a word"]
    samples = [encoder.encode(answered(answer)) for answer in answers]
    prompt = encoder.encode_prompt(answered("a red square"))
    settings = CompressionSettings(compressor=compressor, stages=(Stage(layer=2, ratio=0.5),))
    one_by_one = [kept_vision(model, [sample], settings)[0] for sample in [*samples, prompt]]
    assert len({tuple(kept) for kept in one_by_one}) == 1
    assert kept_vision(model, [*samples, prompt], settings) == one_by_one
    leaking = kept_vision(model, samples, replace(settings, text="released"))
    assert len({tuple(kept) for kept in leaking}) > 1


def test_the_draw_and_the_sample_decide_what_random_keeps(tiny_folder: TinyFolder) -> None:
    model, processor = deep_model(tiny_folder("llava"))
    samples = encode(model, processor)
    settings = CompressionSettings(compressor="random", stages=(Stage(layer=2, ratio=0.75),))
    kept = kept_vision(model, samples, settings)
    assert kept == kept_vision(model, samples, settings)
    assert kept[::-1] == kept_vision(model, samples[::-1], settings)
    others = [
        kept_vision(model, samples, settings, draw=1),
        kept_vision(model, samples, replace(settings, seed=1)),
    ]
    assert all(a != b for other in others for a, b in zip(kept, other, strict=True) if a)
    assert kept[0] != kept[1]  # both have one image of 16 tokens at the same place
