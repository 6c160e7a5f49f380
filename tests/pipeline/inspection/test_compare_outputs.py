"""Promises of inspection/compare_outputs.py: distances by id, and ties that fall the other way."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.inspection.compare_outputs import Spread, output_differences, replaced_ids
from teacher_cache.records.top_k import top_k_record
from teacher_cache.schema.teacher_output import TeacherOutput, TopKRecord
from tests.support.strategies import TIERS, make_cached, with_least


def _output(record: TopKRecord) -> TeacherOutput:
    ids = torch.arange(len(record.ids))
    flags = torch.ones(len(ids), dtype=torch.bool)
    return TeacherOutput(
        views=(), content_ids=ids, is_response=flags, after_image=flags, response=record
    )


def _record(logits: Tensor, k: int) -> TeacherOutput:
    return _output(top_k_record(logits, k))


@pytest.mark.parametrize("records", TIERS)
def test_an_output_is_no_distance_from_itself(records: str) -> None:
    for number in range(3):
        output = make_cached(number, records).output  # pyright: ignore[reportArgumentType]
        output = with_least(output, number)  # -inf among them
        found = output_differences(output, output)
        assert found
        assert all(item.apart == Spread(rms=0.0, largest=0.0) for item in found.values())


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 9), noise=st.sampled_from([0.0, 1e-3, 1.0]))
def test_entries_are_compared_by_id(seed: int, k: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(4, 9, generator=generator)
    right = left + noise * torch.randn(4, 9, generator=generator)
    ours, theirs = _record(left, k), _record(right, k)
    found = output_differences(ours, theirs)["response logits"].apart
    expected: list[float] = []
    replaced = 0
    for one, other in ((ours.response, theirs.response), (theirs.response, ours.response)):
        assert one is not None
        assert other is not None
        for row in range(4):
            kept = dict(zip(other.ids[row].tolist(), other.logits[row].tolist(), strict=True))
            for token, logit in zip(one.ids[row].tolist(), one.logits[row].tolist(), strict=True):
                if token in kept:
                    expected.append(abs(logit - kept[token]))
                else:
                    expected.append(max(0.0, logit - min(kept.values())))
                    replaced += one is ours.response
    assert found.largest == pytest.approx(max(expected), abs=1e-12)
    squares = sum(value * value for value in expected) / len(expected)
    assert found.rms == pytest.approx(squares**0.5, abs=1e-12)
    assert ours.response is not None
    assert theirs.response is not None
    assert replaced_ids(ours.response, theirs.response) == (replaced, 4 * k)
    assert found.largest <= float((left.double() - right.double()).abs().max())


def test_a_tie_that_falls_the_other_way_is_no_difference() -> None:
    left, right = torch.tensor([[3.0, 1.0, 1.0]]), torch.tensor([[3.0, 1.0, 1.0]])
    ours, theirs = _record(left, 2), _record(right.flip(1), 2)
    assert output_differences(ours, ours)["response logits"].apart.largest == 0
    flipped = dataclasses.replace(top_k_record(left, 2), ids=torch.tensor([[0, 2]]).int())
    assert output_differences(ours, _output(flipped))["response logits"].apart.largest == 0
    assert output_differences(ours, theirs)["response logits"].apart.largest == 2


def test_least_probabilities_take_part() -> None:
    left, right = torch.zeros(2, 9), torch.zeros(2, 9)
    right[1, 8] = -4.0
    found = output_differences(_record(left, 3), _record(right, 3))["response least"]
    log_sum_exp = math.log(8 + math.exp(-4))
    assert found.apart.largest == pytest.approx(4 + log_sum_exp - math.log(9), rel=3e-3)
    assert found.dtype == torch.float16


def test_other_tokens_and_other_parts_are_refused() -> None:
    output = make_cached(1, "topk").output
    with pytest.raises(ValueError, match="the tokens differ"):
        output_differences(output, make_cached(2, "topk").output)
    with pytest.raises(ValueError, match="the parts differ"):
        output_differences(output, dataclasses.replace(output, affinity=None))
