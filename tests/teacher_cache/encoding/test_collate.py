"""Batches: every position where its offset says, nothing lost, image inputs joined in order."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacher_cache.encoding.collate import EncodedSample, collate
from teacher_cache.schema.samples import TokenSpans

PAD = 9


def _sample(name: str, length: int, **image_inputs: Tensor) -> EncodedSample:
    nothing = torch.zeros(0, dtype=torch.int64)
    no = torch.zeros(0, dtype=torch.bool)
    spans = TokenSpans(
        views=(),
        vision=nothing,
        content=nothing,
        content_ids=nothing,
        is_response=no,
        after_image=no,
    )
    inputs = {
        "input_ids": torch.arange(length) + 10,
        "attention_mask": torch.ones(length, dtype=torch.int64),
        **image_inputs,
    }
    return EncodedSample(key=name, source_id=name, inputs=inputs, spans=spans)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
)
@settings(deadline=None)
def test_position_p_of_sample_i_sits_at_column_p_plus_offset(
    lengths: list[int], side: Literal["left", "right"]
) -> None:
    samples = [_sample(str(index), length) for index, length in enumerate(lengths)]
    batch = collate(samples, PAD, side)
    assert batch.inputs["input_ids"].shape == (len(lengths), max(lengths))
    for row, (sample, offset) in enumerate(zip(samples, batch.offsets, strict=True)):
        assert offset == (max(lengths) - lengths[row] if side == "left" else 0)
        for column in range(max(lengths)):
            inside = 0 <= column - offset < lengths[row]
            wanted = int(sample.inputs["input_ids"][column - offset]) if inside else PAD
            assert int(batch.inputs["input_ids"][row, column]) == wanted
            assert int(batch.inputs["attention_mask"][row, column]) == int(inside)
        columns = batch.columns(row, torch.arange(lengths[row]))
        assert torch.equal(batch.inputs["input_ids"][row, columns], sample.inputs["input_ids"])


def test_image_inputs_are_joined_in_order_and_padded_with_zeros() -> None:
    few, many = torch.ones(1, 2, 3), torch.full((2, 4, 3), 2.0)
    samples = [
        _sample("a", 3, pixel_values=few),
        _sample("text", 2),
        _sample("b", 4, pixel_values=many),
    ]
    pixels = collate(samples, PAD, "right").inputs["pixel_values"]
    assert pixels.shape == (3, 4, 3)
    assert torch.equal(pixels[0, :2], few[0])
    assert not pixels[0, 2:].any()
    assert torch.equal(pixels[1:], many)


def test_image_inputs_are_absent_where_no_sample_has_an_image() -> None:
    batch = collate([_sample("a", 2), _sample("b", 3)], PAD, "right")
    assert set(batch.inputs) == {"input_ids", "attention_mask"}


def test_samples_that_do_not_go_together_are_refused() -> None:
    types = {"mm_token_type_ids": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match="'b' has no mm_token_type_ids"):
        collate([_sample("a", 2, **types), _sample("b", 2)], PAD, "right")
    wide, flat = torch.ones(1, 2, 3), torch.ones(1, 2)
    with pytest.raises(ValueError, match="pixel_values differs"):
        collate(
            [_sample("a", 2, x=wide, pixel_values=wide), _sample("b", 2, pixel_values=flat)],
            PAD,
            "right",
        )
    with pytest.raises(ValueError, match="at least one sample"):
        collate([], PAD, "right")
    with pytest.raises(ValueError, match="attention_mask has shape"):
        _sample("a", 3, attention_mask=torch.ones(2, dtype=torch.int64))
