"""Solves one linear assignment problem: the pairs of least total cost.

Promise: min(N, M) pairs, optimal up to the solver's float64, sorted by row, no row and no column
twice; N and M may differ either way. No gradient, CPU only. `cost.py` computes costs, `matching.py`
decides which tokens form one problem.
"""

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor


def solve_assignment(cost: Float[Tensor, "N M"]) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Return the (row, column) indices of the min(N, M) pairs of least total cost; on the CPU.

    SciPy's shortest augmenting paths take 0.5 to 3 ms at 144 x 729, where the costs take about 100
    (docs/method.md). ValueError for costs that are NaN or infinite: SciPy would pair some of them.
    """
    matrix = cost.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(
            f"{int((~torch.isfinite(matrix)).sum())} of {matrix.numel()} matching costs are NaN "
            "or infinite: the student's vision logits have overflowed; lower the learning rate "
            "or train in a wider dtype"
        )
    rows, columns = map(torch.from_numpy, linear_sum_assignment(matrix.numpy()))
    order = rows.argsort()
    return rows[order], columns[order]
