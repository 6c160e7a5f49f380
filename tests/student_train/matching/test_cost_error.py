"""The stated error of a cost holds, and so no certificate is wrong: any dtypes, any large constant.

References are the distances of every logit in float64, solved by SciPy.
"""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import MatchingConfig
from student_train.matching.certificate import prove_pairs
from student_train.matching.cost import cost_matrix
from student_train.matching.cost_error import cost_error
from student_train.signals.teacher_signal import DenseSignal, Signal, TopKSignal
from teacher_cache.records.top_k import top_k_record
from tests.support.batches import normal
from tests.support.lazy import linear_sum_assignment

PROBABILITIES = MatchingConfig(metric="prob_l1")
LOGITS = MatchingConfig(num_shared_ids=None)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
SIZES = st.tuples(st.integers(1, 5), st.integers(1, 6), st.sampled_from([2, 17, 300]))
SHARPNESS = st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0])


def distances(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.double()[:, None] - teacher.double()).abs().sum(dim=2)


def must_keep(cost: Tensor, row: int, column: int) -> bool:
    """Whether every optimal assignment pairs the two: without them, all cost more."""
    dense = cost.numpy()
    best = dense[linear_sum_assignment(dense)].sum()
    without = dense.copy()
    without[row, column] = 1e9
    rows, columns = linear_sum_assignment(without)
    if column in columns[rows == row]:
        return True  # nothing else is possible
    return bool(without[rows, columns].sum() > best)


def check(student: Tensor, signal: Signal, config: MatchingConfig, true: Tensor) -> None:
    cost = cost_matrix(student[:, :1], student, signal, config)
    bound = cost_error(signal, config, cost.dtype).of(cost)
    # What the reference itself rounds, and nothing else.
    slack = 1e-14 * (true + 1)
    assert bool(((cost.double() - true).abs() <= bound + slack).all())
    rows, columns = (torch.from_numpy(np.asarray(each)) for each in linear_sum_assignment(cost))
    held = prove_pairs(cost, bound + slack, rows, columns)
    for row, column, is_held in zip(rows.tolist(), columns.tolist(), held.tolist(), strict=True):
        assert not is_held or must_keep(true, row, column)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    sizes=SIZES,
    dtypes=st.tuples(DTYPES, DTYPES),
    sharpness=st.tuples(SHARPNESS, SHARPNESS),
    constant=st.sampled_from([0.0, 100.0, 50_000.0]),
    kept=st.sampled_from([1, 2, 200, None]),
)
def test_probability_costs_stay_within_their_bound_and_certify_nothing_wrong(
    seed: int,
    sizes: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    sharpness: tuple[float, float],
    constant: float,
    kept: int | None,
) -> None:
    num_students, num_teachers, vocab_size = sizes
    student = (normal(seed, num_students, vocab_size) * sharpness[0]).to(dtypes[0])
    logits = (normal(seed + 1, num_teachers, vocab_size) * sharpness[1] + constant).to(dtypes[1])
    signal: Signal = DenseSignal(logits=logits)
    if kept is not None:
        signal = TopKSignal(record=top_k_record(logits, min(kept, vocab_size)))
    true = distances(student.double().softmax(1), logits.double().softmax(1))
    check(student, signal, PROBABILITIES, true)


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    sizes=SIZES,
    dtypes=st.tuples(DTYPES, DTYPES),
    sharpness=SHARPNESS,
    constant=st.sampled_from([0.0, 100.0, 1e6]),
)
def test_logit_costs_over_all_rows_stay_within_their_bound_and_certify_nothing_wrong(
    seed: int,
    sizes: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    sharpness: float,
    constant: float,
) -> None:
    num_students, num_teachers, vocab_size = sizes
    student, logits = (
        (normal(seed + side, size, vocab_size) * sharpness + constant)
        .clamp(max=min(2e6, torch.finfo(dtype).max))
        .to(dtype)
        for side, (size, dtype) in enumerate([(num_students, dtypes[0]), (num_teachers, dtypes[1])])
    )
    check(student, DenseSignal(logits=logits), LOGITS, distances(student, logits))
