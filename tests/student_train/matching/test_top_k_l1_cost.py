"""The sparse cost is the dense cost of the filled-in teacher, for any record and any dtype."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import MatchingConfig
from student_train.matching.cost import cost_matrix
from student_train.matching.top_k_l1_cost import sparse_probability_l1
from student_train.ops.precision import at_least_float32
from student_train.signals.teacher_signal import DenseSignal
from student_train.signals.top_k import TopKSignal
from tests.support.batches import normal
from tests.support.strategies import true_record

VOCAB = 40


def kept_of(logits: Tensor, counts: Sequence[int]) -> TopKSignal:
    return TopKSignal(record=true_record(logits, counts))


def filled_in(teacher: TopKSignal) -> Tensor:
    """Every row's distribution, entry by entry: kept probabilities and the uniform tail."""
    rows: list[list[float]] = []
    for row in range(teacher.num_rows):
        count = int(teacher.counts[row])
        outside = teacher.vocab_size - count
        share = float(teacher.record.log_tail[row].exp()) / outside if outside else 0.0
        filled = [share] * teacher.vocab_size
        for entry in range(count):
            log_prob = teacher.record.logits[row, entry] - teacher.record.logsumexp[row]
            filled[int(teacher.record.ids[row, entry])] = float(log_prob.exp())
        rows.append(filled)
    return torch.tensor(rows, dtype=torch.float64)


def dense_cost(student: Tensor, teacher: TopKSignal) -> Tensor:
    own = at_least_float32(student).softmax(dim=1).double()
    return (own[:, None] - filled_in(teacher)).abs().sum(dim=2)


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.integers(1, VOCAB), min_size=1, max_size=6),
    num_students=st.integers(1, 4),
    sharpness=st.sampled_from([0.0, 0.3, 1.0, 6.0, 40.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_the_sparse_cost_is_the_dense_cost_of_the_filled_in_teacher(
    seed: int, counts: list[int], num_students: int, sharpness: float, dtype: torch.dtype
) -> None:
    teacher = kept_of(normal(seed, len(counts), VOCAB) * sharpness, counts)
    student = (normal(seed + 1, num_students, VOCAB) * sharpness).to(dtype)
    before = student.clone(), teacher.record.logits.clone()
    found = sparse_probability_l1(student, teacher)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found.double(), dense_cost(student, teacher), rtol=0, atol=bound)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher.record.logits, before[1])


def test_every_entry_is_exact_where_all_are_kept_and_lossy_records_keep_to_their_numbers() -> None:
    logits, student = normal(0, 4, VOCAB), normal(1, 3, VOCAB)
    all_kept = kept_of(logits, [VOCAB] * 4)
    exact = (student.softmax(1)[:, None] - logits.softmax(1)).abs().sum(2)
    torch.testing.assert_close(sparse_probability_l1(student, all_kept), exact)
    some = kept_of(logits, [30] * 4)
    rounded = (some.record.logits - 0.7).round()
    # Once rounded, a kept entry may lie below the tail's share.
    coarse = TopKSignal(
        record=replace(some.record, logits=rounded, log_tail=some.record.log_tail + 1)
    )
    assert bool((filled_in(coarse).amin(1) < coarse.record.log_tail.exp() / 10).any())
    torch.testing.assert_close(sparse_probability_l1(student, coarse), dense_cost(student, coarse))


@pytest.mark.parametrize("sharpness", [0.0, 0.01, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabularies_have_the_same_costs_in_any_company(
    sharpness: float, dtype: torch.dtype
) -> None:
    vocab_size = 20_000
    logits = normal(4, 3, vocab_size) * torch.tensor([[1.0], [2.0], [4.0]])
    teacher = kept_of(logits.float(), [30, 20, 5])
    student = (normal(5, 6, vocab_size) * sharpness).to(dtype)
    found = sparse_probability_l1(student, teacher)
    torch.testing.assert_close(found.double(), dense_cost(student, teacher), rtol=0, atol=1e-6)
    for row in range(6):
        alone = sparse_probability_l1(student[row : row + 1], teacher)
        torch.testing.assert_close(alone, found[row : row + 1], rtol=0, atol=0)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), counts=st.lists(st.integers(1, VOCAB), min_size=2, max_size=6))
def test_costs_move_with_their_tokens_and_are_off_by_twice_the_tail_at_most(
    seed: int, counts: list[int]
) -> None:
    logits, student = normal(seed, len(counts), VOCAB), normal(seed + 1, 3, VOCAB)
    teacher = kept_of(logits, counts)
    config = MatchingConfig(metric="prob_l1")
    costs = cost_matrix(student[:, :1], student, teacher, config)
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))
    moved = cost_matrix(student.flip(0)[:, :1], student.flip(0), teacher.rows(order), config)
    torch.testing.assert_close(moved, costs.flip(0)[:, order], rtol=0, atol=1e-12)
    exact = cost_matrix(student[:, :1], student, DenseSignal(logits=logits), config)
    assert bool(((costs - exact).abs() <= 2 * teacher.record.log_tail.exp() + 1e-6).all())


@pytest.mark.parametrize("num_students", [0, 2])
def test_a_teacher_of_no_positions_has_no_costs(num_students: int) -> None:
    teacher = kept_of(normal(2, 1, VOCAB), [3]).rows(torch.arange(0))
    assert sparse_probability_l1(normal(3, num_students, VOCAB), teacher).shape == (num_students, 0)
