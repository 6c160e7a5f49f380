"""Which record of a cached grid teaches a student that drops a given share of its vision tokens."""

import dataclasses

import pytest
import torch

from student_train.config.compression import grid_ratio
from student_train.signals.from_cache import response_signal, teacher_response_at
from student_train.signals.teacher_signal import DenseSignal, HiddenSignal, TopKSignal
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.lm_head import LmHead
from teacher_cache.schema.teacher_output import TeacherOutput
from tests.support.strategies import VOCAB_SIZE, WIDTH, make_output

RATIOS = (0.25, 0.5, 0.75)
HEAD = LmHead(weight=torch.randn(VOCAB_SIZE, WIDTH), bias=None)


def test_it_is_the_largest_ratio_that_is_no_more_than_the_wanted_one() -> None:
    table = {-0.1: 0, 0.0: 0, 0.2499: 0, 0.25: 0.25, 0.6: 0.5, 0.75: 0.75, 0.99: 0.75}
    assert {wanted: grid_ratio(RATIOS, wanted) for wanted in table} == table
    assert grid_ratio((), 0.9) == 0
    # A subtraction leaves a hair less than the decimal that is meant.
    assert 0.7 - 0.2 < 0.5
    assert grid_ratio(RATIOS, 0.7 - 0.2) == 0.5


@pytest.mark.parametrize("tier", ["topk", "hidden"])
def test_the_record_of_that_ratio_is_the_signal(tier: str) -> None:
    output = make_output("hidden" if tier == "hidden" else "topk", 0, ratios=RATIOS)
    assets = TeacherAssets(head=HEAD)
    for wanted, ratio in ((0.9, 0.75), (0.5, 0.5), (0.3, 0.25)):
        signal = teacher_response_at(output, assets, wanted)
        assert torch.equal(_numbers(signal), _stored(output, ratio))
    for least in (output, dataclasses.replace(output, response_grid=None, hidden_grid=None)):
        ordinary = teacher_response_at(least, assets, 0.1)
        assert torch.equal(_numbers(ordinary), _numbers(response_signal(output, assets)))
    without = dataclasses.replace(output, response_grid=None, hidden_grid=None)
    assert torch.equal(_numbers(teacher_response_at(without, assets, 0.9)), _numbers(ordinary))


def _numbers(signal: DenseSignal | HiddenSignal | TopKSignal) -> torch.Tensor:
    assert not isinstance(signal, DenseSignal)
    return signal.hidden if isinstance(signal, HiddenSignal) else signal.record.logits


def _stored(output: TeacherOutput, ratio: float) -> torch.Tensor:
    if output.hidden_grid is not None:
        return output.hidden_grid[ratio]
    assert output.response_grid is not None
    return output.response_grid[ratio].logits
