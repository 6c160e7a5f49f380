"""Solves one linear assignment problem, and the types of its solution.

Promise: min(N, M) pairs, optimal up to the solver's float64, sorted by row, no row and no column
twice; N and M may differ either way. No gradient, CPU only.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class SolvedProblem(NamedTuple):
    """One assignment problem and its solution; rows and columns are its own; all on the CPU."""

    cost: Float[Tensor, "n m"]
    rows: Int[Tensor, " p"]
    columns: Int[Tensor, " p"]
    total_cost: float
    separability: float
    hubness: float
    certified: Bool[Tensor, " p"] | None
    """Pairs that are provably those of the exact costs (`MatchingConfig.certify`)."""
    places: "PairPlaces | None" = None
    """None for scope=global, where it is not known where tokens lie."""


class PairPlaces(NamedTuple):
    """What the pairs of one problem say of places."""

    mean_distance: float
    """Between the tokens of a pair, in heights and widths of the view."""
    inside: float
    """Share of the pairs whose teacher token is in the student token's window."""
    local: float
    """Share of the pairs that the correspondence `local` has too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Student token `student[i]` is matched to teacher token `teacher[i]`.

    No student token occurs twice, and no teacher token but under `nearest`.
    `problems` keeps each solved problem with its costs, for diagnostics.
    """

    student: Int[Tensor, " P"]
    teacher: Int[Tensor, " P"]
    num_student: int
    num_teacher: int
    problems: tuple[SolvedProblem, ...] = field(repr=False)

    @property
    def num_pairs(self) -> int:
        """Matched pairs."""
        return self.student.shape[0]

    @property
    def total_cost(self) -> float:
        """Cost of all pairs."""
        return sum((problem.total_cost for problem in self.problems), 0.0)

    @property
    def unmatched_students(self) -> Int[Tensor, " U"]:
        """Student tokens without a partner: none unless some problem has N > M."""
        free = torch.ones(self.num_student, dtype=torch.bool, device=self.student.device)
        free[self.student] = False
        return free.nonzero()[:, 0]


def solve_assignment(cost: Float[Tensor, "N M"]) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Return the (row, column) indices of the min(N, M) pairs of least total cost; on the CPU.

    SciPy's shortest augmenting paths take 0.5 to 3 ms at 144 x 729, where the costs take about 100
    (docs/method.md). ValueError for costs that are NaN or infinite: SciPy would pair some of them.
    """
    matrix = cost.detach().to("cpu", torch.float64)
    require_finite(matrix)
    from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportMissingTypeStubs]

    rows, columns = map(torch.from_numpy, linear_sum_assignment(matrix.numpy()))
    order = rows.argsort()
    return rows[order], columns[order]


def require_finite(cost: Float[Tensor, "N M"]) -> None:
    """Raise ValueError for costs that are NaN or infinite."""
    bad = ~torch.isfinite(cost)
    if bool(bad.any()):
        raise ValueError(
            f"{int(bad.sum())} of {bad.numel()} matching costs are NaN or infinite: the student's "
            "vision logits have overflowed; lower the learning rate or train in a wider dtype"
        )
