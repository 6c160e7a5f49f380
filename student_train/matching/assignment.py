"""Which pairs have the least total cost: the linear assignment problem, handed to a solver.

Promise: min(N, M) pairs, optimal up to the solver's float64, no row and no column twice, sorted by
row; rectangular problems either way round. Where several pairings cost the same, solvers may choose
different ones. No gradient, no device but the CPU, and no knowledge of what a cost means: `cost.py`
computes costs, `matching.py` decides what is one problem. Costs that are NaN or infinite are
refused, since a solver would pair them in silence, and so is a solver that is not installed.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from student_train.config.objective import MatchSolver


def solve_assignment(
    cost: Float[Tensor, "N M"], solver: MatchSolver = "scipy"
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """The min(N, M) pairs of least total cost, as (row, column) indices sorted by row; on the CPU.

    SciPy's shortest augmenting paths solve the rectangular problem in float64: half a millisecond
    to three at 144 x 729, where the costs take a hundred (docs/method.md has lapx beside it).
    ValueError for costs that are not finite, and where `solver` is not installed.
    """
    solve = linear_sum_assignment if solver == "scipy" else _lapjvh()
    matrix = cost.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(
            f"{int((~torch.isfinite(matrix)).sum())} of {matrix.numel()} matching costs are NaN "
            "or infinite: the student's vision logits have overflowed; lower the learning rate "
            "or train in a wider dtype"
        )
    rows, columns = map(torch.from_numpy, solve(matrix.numpy()))
    order = rows.argsort()
    return rows[order], columns[order]


def _lapjvh() -> Callable[[Any], Any]:
    """The solver of an optional package, called as SciPy's is."""
    try:
        from lap import lapjvh
    except ImportError as error:
        raise ValueError(
            f"matching.solver is 'lapjvh', which is part of lapx 0.11 or later, and here it cannot "
            f"be imported ({error}); pip install 'emkd[lapx]' wherever the run trains, or take "
            "solver 'scipy'"
        ) from error
    return lambda matrix: lapjvh(matrix, extend_cost=True, return_cost=False)
