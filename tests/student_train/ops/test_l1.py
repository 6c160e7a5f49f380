"""Distances in strips are those of the loops, and within the stated rounding of the true ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.config.objective import MatchingConfig, MatchMetric
from student_train.matching.cost import cost_matrix
from student_train.ops.l1 import l1_distances, l1_rounding
from student_train.signals.teacher_signal import DenseSignal, HiddenSignal
from teacher_cache.records.lm_head import LmHead
from tests.support import references
from tests.support.batches import normal


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    num_rows=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    num_columns=st.integers(0, 50),
)
def test_distances_are_those_of_the_loops(
    seed: int, num_rows: tuple[int, int], num_columns: int
) -> None:
    left, right = (normal(seed + i, n, num_columns) for i, n in enumerate(num_rows))
    found = l1_distances(left, right)
    expected = [[references.l1(a, b) for b in right.tolist()] for a in left.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected).double().reshape(num_rows))


@pytest.mark.parametrize("num_columns", [15, 16, 17, 8191, 8192, 8193, 20_000])
def test_rounding_stays_within_its_bound(num_columns: int) -> None:
    left, right = normal(0, 3, num_columns).float(), normal(1, 5, num_columns).float()
    exact = (left.double()[:, None] - right.double()).abs().sum(dim=2)
    error = (l1_distances(left, right) - exact).abs()
    assert bool((error <= l1_rounding(num_columns, torch.float32) * exact).all())


def test_a_pair_does_not_depend_on_other_pairs_and_inputs_stay() -> None:
    left, right = normal(2, 9, 9000).float(), normal(3, 7, 9000).float()
    before = left.clone(), right.clone()
    whole = l1_distances(left, right)
    assert torch.equal(whole[4:6, 1:3], l1_distances(left[4:6], right[1:3]))
    assert torch.equal(left, before[0])
    assert torch.equal(right, before[1])


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 6), st.integers(0, 6)),
    num_columns=st.sampled_from([0, 1, 15, 16, 64, 100, 8193]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_leading_dimensions_are_problems_of_their_own_to_the_bit(
    seed: int, sizes: tuple[int, int, int, int], num_columns: int, dtype: torch.dtype
) -> None:
    first, second, num_left, num_right = sizes
    left = normal(seed, first, second, num_left, num_columns).to(dtype)
    right = normal(seed + 1, first, second, num_right, num_columns).to(dtype)
    found = l1_distances(left, right)
    assert found.shape == (first, second, num_left, num_right)
    for i in range(first):
        for j in range(second):
            assert torch.equal(found[i, j], l1_distances(left[i, j], right[i, j]))


@pytest.mark.parametrize("metric", ["raw_l1", "centred_l1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_costs_over_more_vocabulary_than_a_block_are_those_of_all_of_it(
    metric: MatchMetric, dtype: torch.dtype
) -> None:
    vocab_size = 2 * 8192 + 5
    head = LmHead(weight=normal(4, vocab_size, 3).float())
    hidden, student = normal(5, 4, 3).float(), normal(6, 3, vocab_size).to(dtype)
    before = student.clone()
    own, theirs = student.double(), head.logits(hidden).double()
    if metric == "centred_l1":
        own, theirs = (rows - rows.mean(dim=1, keepdim=True) for rows in (own, theirs))
    expected = torch.cdist(own, theirs, p=1)
    config = MatchingConfig(metric=metric, num_shared_ids=None)
    for teacher in (
        DenseSignal(logits=head.logits(hidden)),
        HiddenSignal(hidden=hidden, head=head),
    ):
        found = cost_matrix(student[:, :1], student, teacher, config)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(student, before)
