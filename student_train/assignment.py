"""Which pairs have the least total cost: the linear assignment problem, handed to a solver.

Promise: min(N, M) pairs, optimal up to the solver's float64, no row and no column twice, sorted by
row; rectangular problems either way round. No gradient, no device but the CPU, and no knowledge of
what a cost means: `cost.py` computes costs, `matching.py` decides what is one problem. Costs that
are NaN or infinite are refused, since a solver would pair them in silence.
"""

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor


def solve_assignment(
    cost: Float[Tensor, "N M"],
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """The min(N, M) pairs of least total cost, as (row, column) indices sorted by row; on the CPU.

    SciPy's shortest augmenting paths solve the rectangular problem in float64: half a millisecond
    to three at 144 x 729, where the costs take a hundred (docs/method.md).
    """
    matrix = cost.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(
            f"{int((~torch.isfinite(matrix)).sum())} of {matrix.numel()} matching costs are NaN "
            "or infinite: the student's vision logits have overflowed; lower the learning rate "
            "or train in a wider dtype"
        )
    rows, columns = linear_sum_assignment(matrix.numpy())
    return torch.from_numpy(rows), torch.from_numpy(columns)
