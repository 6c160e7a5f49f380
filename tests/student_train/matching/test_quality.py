"""Health metrics on matrices a reader can check by eye."""

import pytest
import torch
from torch import nn

from student_train.config.objective import MatchingConfig
from student_train.matching.matching import match_tokens
from student_train.matching.quality import assignment_stats, hubness, row_mean_spread, separability
from student_train.signals.from_cache import vision_signal
from student_train.signals.teacher_signal import DenseSignal, kept_mass
from student_train.training.gradient_norms import term_gradient_norms
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.samples import ViewGrid
from tests.support.batches import ONE_IMAGE, random_batch


def test_a_cost_of_rows_plus_columns_is_not_separable_and_a_diagonal_is() -> None:
    additive = torch.tensor([[1.0, 2.0, 5.0]]) + torch.tensor([[10.0], [0.0], [3.0]])
    assert separability(additive) == pytest.approx(0.0, abs=1e-12)
    assert separability(1 - torch.eye(4)) == pytest.approx(1.0)
    assert separability(torch.ones(2, 3)) == 1.0


def test_hubness_counts_distinct_nearest_teachers() -> None:
    assert hubness(1 - torch.eye(4)) == 1.0
    assert hubness(torch.tensor([[0.0, 1.0], [0.0, 1.0]])) == 0.5


def test_assignment_stats_average_over_problems() -> None:
    logits = torch.eye(3)
    views = [ViewGrid(image=0, view=0, rows=1, cols=3)]
    pairs = match_tokens(logits, logits, views, DenseSignal(logits=logits), views, MatchingConfig())
    stats = assignment_stats([pairs, pairs])
    assert (stats.mean_cost, stats.hubness) == (0.0, 1.0)
    assert stats.separability == pytest.approx(1.0)
    assert assignment_stats([]).separability is None


def test_kept_mass_is_what_the_entries_hold() -> None:
    batch = random_batch(0, [ONE_IMAGE])
    record = batch.hidden_outputs[0].hidden
    assert record is not None
    logits = batch.teacher_head.logits(record.vision)
    signal = vision_signal(batch.outputs("topk", 4)[0], TeacherAssets())
    expected = logits.softmax(1).topk(4).values.sum(1).mean().item()
    assert kept_mass(signal) == pytest.approx(expected)
    assert kept_mass(DenseSignal(logits=logits)) == 1.0
    assert kept_mass(DenseSignal(logits=logits[:0])) == 0.0


def test_row_mean_spread_is_the_part_that_softmax_ignores() -> None:
    logits = torch.randn(3, 7)
    shift = torch.tensor([[0.0], [3.0], [6.0]])
    centred = logits - logits.mean(1, keepdim=True)
    assert row_mean_spread(centred) == pytest.approx(0.0, abs=1e-6)
    assert row_mean_spread(centred + shift) == pytest.approx(3.0, rel=1e-5)
    assert row_mean_spread(logits[:1]) == 0.0


def test_gradient_norms_are_per_term_and_touch_no_grad() -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    unused = nn.Parameter(torch.ones(2))
    terms = {
        "half": (weight**2).sum() / 2,
        "none": torch.zeros(()),
        "empty": weight[:0].sum(),
    }
    norms = term_gradient_norms(terms, [weight, frozen, unused])
    assert norms == pytest.approx({"half": 5.0, "none": 0.0, "empty": 0.0})
    assert weight.grad is None
    terms["half"].backward()
    assert weight.grad is not None
