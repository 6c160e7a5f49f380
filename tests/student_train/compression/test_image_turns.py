"""Which text may decide about which images: known before the answer, turn by turn."""

from dataclasses import replace

import torch

from student_train.compression.image_turns import ImageTurn, image_turns
from teacher_cache.encoding.collate import EncodedSample
from tests.support.deep import made_up_sample

# <bos> V V u u <ctl> r r | u V V V u <ctl> r r
VISION = [[1, 2], [9, 10, 11]]


def encoded(num_tokens: int = 16) -> EncodedSample:
    """Two turns with an image each, or the beginning of them."""
    places = ([1, 2, 9, 10, 11], [3, 4, 8, 12], [6, 7, 14, 15])
    vision, text, response = ([p for p in kind if p < num_tokens] for kind in places)
    return made_up_sample(num_tokens, vision, text, response, "two turns")


def as_lists(turns: tuple[ImageTurn, ...]) -> list[tuple[list[int], list[int], int]]:
    return [(turn.vision.tolist(), turn.text.tolist(), turn.end) for turn in turns]


def test_images_are_judged_by_their_own_turns_question() -> None:
    assert as_lists(image_turns(encoded(), "instruction")) == [
        ([1, 2], [3, 4], 5),
        ([9, 10, 11], [8, 12], 13),
    ]


def test_a_prompt_has_the_turns_of_the_conversation_that_follows_it() -> None:
    whole = as_lists(image_turns(encoded(), "instruction"))
    assert as_lists(image_turns(encoded(14), "instruction")) == whole
    assert as_lists(image_turns(encoded(6), "instruction")) == whole[:1]


def test_released_takes_all_text_behind_the_images_answers_included() -> None:
    assert as_lists(image_turns(encoded(), "released")) == [
        ([1, 2], [3, 4, 5, 6, 7, 8, 12, 13, 14, 15], 15),
        ([9, 10, 11], [12, 13, 14, 15], 15),
    ]


def test_text_alone_has_no_turn() -> None:
    sample = encoded()
    spans = replace(sample.spans, views=(), vision=torch.zeros(0, dtype=torch.int64))
    assert image_turns(replace(sample, spans=spans), "instruction") == ()


def test_views_that_are_not_in_order_come_out_ascending() -> None:
    sample = encoded()
    spans = replace(sample.spans, vision=sample.spans.vision.flip(0))
    vision = [
        turn.vision.tolist() for turn in image_turns(replace(sample, spans=spans), "instruction")
    ]
    assert vision == VISION


def test_an_answer_that_is_not_learnt_ends_its_turn_all_the_same() -> None:
    """Else the next question would help to choose the tokens of this turn's image."""
    sample = encoded()
    whole = image_turns(sample, "instruction")
    spans = sample.spans
    second = spans.content > 8  # the first answer is shown only
    shown = replace(
        spans,
        content=spans.content[~spans.is_response | second],
        content_ids=spans.content_ids[~spans.is_response | second],
        is_response=spans.is_response[~spans.is_response | second],
        after_image=spans.after_image[~spans.is_response | second],
        answers=torch.tensor([6, 14]),
    )
    assert as_lists(image_turns(replace(sample, spans=shown), "instruction")) == as_lists(whole)
