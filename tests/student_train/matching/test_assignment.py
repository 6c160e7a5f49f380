"""Assignments are optimal, injective and sorted, whichever side is wider."""

from typing import Protocol

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.matching.assignment import solve_assignment
from tests.support import references
from tests.support.batches import normal


class MakeCosts(Protocol):
    def __call__(self, seed: int, num_rows: int, num_columns: int, /) -> Tensor: ...


def tied(seed: int, num_rows: int, num_columns: int) -> Tensor:
    """Costs of three values, so that most problems have many best pairings."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, (num_rows, num_columns), generator=generator).double()


@pytest.mark.parametrize("costs", [normal, tied])
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), num_rows=st.integers(0, 7), num_columns=st.integers(0, 7))
def test_the_assignment_is_injective_sorted_and_optimal(
    costs: MakeCosts, seed: int, num_rows: int, num_columns: int
) -> None:
    cost = costs(seed, num_rows, num_columns)
    rows, columns = solve_assignment(cost)
    assert len(rows) == len(columns) == min(num_rows, num_columns)
    assert len(set(columns.tolist())) == len(columns)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert rows.dtype == columns.dtype == torch.int64
    best, _ = references.best_assignment(cost.tolist()) if cost.numel() else (0.0, [])
    assert float(cost[rows, columns].sum()) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_costs_that_are_not_finite_are_refused(bad: float) -> None:
    cost = normal(0, 3, 4)
    cost[1, 2] = bad
    with pytest.raises(ValueError, match="1 of 12 matching costs are NaN or infinite"):
        solve_assignment(cost)
