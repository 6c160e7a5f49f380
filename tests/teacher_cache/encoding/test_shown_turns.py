"""A turn that is shown and not learnt is no label; a question without an answer is a prompt."""

from dataclasses import replace

import pytest

from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.models.checkpoint import load_model
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.samples import Message, make_sample
from tests.conftest import TinyFolder

ONE_OR_BOTH = ((True, True), (True, False), (False, True))
TEXTS = ("one?", "first", "two?", "second")


def conversation(*learn: bool) -> tuple[Message, ...]:
    learnt = iter(learn)
    return tuple(
        Message(role="user", text=text)
        if index % 2 == 0
        else Message(role="assistant", text=text, learn=next(learnt))
        for index, text in enumerate(TEXTS)
    )


@pytest.fixture(scope="module")
def encoder(tiny_folder: TinyFolder) -> SampleEncoder:
    model, processor = load_model(str(tiny_folder("llava")))
    return SampleEncoder(processor, model.config)


def labels(encoder: SampleEncoder, *learn: bool) -> str:
    spans = encoder.encode(make_sample("s", [], conversation(*learn))).spans
    return encoder.processor.tokenizer.decode(spans.content_ids[spans.is_response])


def test_only_learnt_turns_are_labels(encoder: SampleEncoder) -> None:
    both, first, second = (labels(encoder, *learn) for learn in ONE_OR_BOTH)
    assert both == first + second
    assert ("first" in first, "second" in first) == (True, False)
    assert ("first" in second, "second" in second) == (False, True)
    with pytest.raises(SampleError, match="no token of it is a response"):
        labels(encoder, False, False)


def test_the_model_sees_a_turn_that_is_not_learnt(encoder: SampleEncoder) -> None:
    seen = [
        encoder.encode(make_sample("s", [], conversation(*learn))).inputs["input_ids"].tolist()
        for learn in ((True, True), (False, True))
    ]
    assert seen[0] == seen[1]


def test_a_question_without_an_answer_is_the_prompt_of_the_answered_one(
    encoder: SampleEncoder,
) -> None:
    whole = make_sample("s", [], conversation(True, True))
    asked = replace(whole, messages=whole.messages[:-1])
    prompts = [encoder.encode_prompt(sample).inputs["input_ids"] for sample in (whole, asked)]
    assert prompts[0].tolist() == prompts[1].tolist()


@pytest.mark.parametrize("learn", ONE_OR_BOTH)
def test_every_answer_has_its_first_position_learnt_or_not(
    encoder: SampleEncoder, learn: tuple[bool, bool]
) -> None:
    both = encoder.encode(make_sample("s", [], conversation(True, True))).spans
    some = encoder.encode(make_sample("s", [], conversation(*learn))).spans
    assert both.answers is not None
    assert some.answers is not None
    assert some.answers.tolist() == both.answers.tolist()
    starts = [p for p in both.response.tolist() if p - 1 not in both.response.tolist()]
    assert both.answers.tolist() == starts
