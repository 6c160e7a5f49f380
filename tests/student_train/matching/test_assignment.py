"""Assignments are optimal, injective and sorted, whoever solves them, whichever side is wider."""

import sys
from types import ModuleType
from typing import Protocol

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import MatchingConfig, MatchSolver, ObjectiveConfig
from student_train.losses.require_served import require_served
from student_train.matching.assignment import solve_assignment
from student_train.signals.teacher_signal import DenseSignal
from tests.student_train.matching.test_matching import match_one_view, normal
from tests.support import references
from tests.support.batches import ONE_IMAGE, random_batch
from tests.support.strategies import make_spec

SOLVERS: tuple[MatchSolver, ...] = ("scipy", "lapjvh")


class MakeCosts(Protocol):
    def __call__(self, seed: int, num_rows: int, num_columns: int, /) -> Tensor: ...


def tied(seed: int, num_rows: int, num_columns: int) -> Tensor:
    """Costs of three values, so that most problems have many best pairings."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, (num_rows, num_columns), generator=generator).double()


def lapx_asked_for() -> ObjectiveConfig:
    return ObjectiveConfig(matching=MatchingConfig(solver="lapjvh"))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("costs", [normal, tied])
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), num_rows=st.integers(0, 7), num_columns=st.integers(0, 7))
def test_the_assignment_is_injective_sorted_and_optimal(
    costs: MakeCosts, solver: MatchSolver, seed: int, num_rows: int, num_columns: int
) -> None:
    cost = costs(seed, num_rows, num_columns)
    rows, columns = solve_assignment(cost, solver)
    assert len(rows) == len(columns) == min(num_rows, num_columns)
    assert len(set(columns.tolist())) == len(columns)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert rows.dtype == columns.dtype == torch.int64
    best, _ = references.best_assignment(cost.tolist()) if cost.numel() else (0.0, [])
    assert float(cost[rows, columns].sum()) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("costs", [normal, tied])
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), num_rows=st.integers(0, 60), num_columns=st.integers(0, 60))
def test_both_solvers_find_the_same_total(
    costs: MakeCosts, seed: int, num_rows: int, num_columns: int
) -> None:
    cost = costs(seed, num_rows, num_columns)
    totals = [float(cost[solve_assignment(cost, solver)].sum()) for solver in SOLVERS]
    assert totals[0] == pytest.approx(totals[1], abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_costs_that_are_not_finite_are_refused(solver: MatchSolver, bad: float) -> None:
    cost = normal(0, 3, 4)
    cost[1, 2] = bad
    with pytest.raises(ValueError, match="1 of 12 matching costs are NaN or infinite"):
        solve_assignment(cost, solver)


def test_a_matching_is_solved_by_the_solver_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = normal(1, 5, 11), DenseSignal(logits=normal(2, 8, 11))
    by_scipy = match_one_view(student, teacher, MatchingConfig())
    monkeypatch.setattr("student_train.matching.assignment.linear_sum_assignment", None)
    by_lapx = match_one_view(student, teacher, MatchingConfig(solver="lapjvh"))
    assert by_lapx.teacher.tolist() == by_scipy.teacher.tolist()


def test_a_missing_solver_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden = make_spec("hidden")
    assets = random_batch(
        0, [ONE_IMAGE], student_width=hidden.hidden_size, vocab_size=hidden.vocab_size
    ).assets("hidden")
    require_served(lapx_asked_for(), hidden, assets)
    monkeypatch.setitem(sys.modules, "lap", None)
    with pytest.raises(ValueError, match=r"pip install 'emkd\[lapx\]'.*or take solver 'scipy'"):
        require_served(lapx_asked_for(), hidden, assets)
    require_served(ObjectiveConfig(), hidden, assets)
    without = ObjectiveConfig(vsd_weight=0.0, vlad_weight=0.0, matching=lapx_asked_for().matching)
    require_served(without, hidden, assets)


def test_another_package_of_that_name_is_no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lap", ModuleType("lap"))
    with pytest.raises(ValueError, match=r"lapx 0\.11 or later.*cannot import name 'lapjvh'"):
        solve_assignment(normal(0, 2, 2), "lapjvh")
