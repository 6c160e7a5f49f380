"""Pairs tokens inside windows: what a student token shows, it learns from what stood there."""

import torch

from student_train.matching.assignment import require_finite, solve_assignment
from student_train.matching.correspondences.pairing import PairingProblem, Pairs


def local(problem: PairingProblem) -> Pairs:
    """As many pairs inside the student tokens' windows as can be; of these, the least total cost.

    No token twice: min(n, m) pairs. Pairs outside occur only where windows have too few teacher
    tokens for all student tokens.
    """
    require_finite(problem.cost)
    cost, inside = problem.cost.to(torch.float64), problem.places().inside
    if bool(inside.any(dim=1).all()) and int(inside.sum(dim=0).max()) < 2:
        # No two windows share a teacher token, so each student token takes the cheapest of its own.
        cheapest = torch.where(inside, cost, torch.inf).argmin(dim=1)
        return torch.arange(len(cost)), cheapest
    # One pair outside costs more than all pairs can differ by.
    outside = (cost.max() - cost.min()) * min(cost.shape) + 1.0
    return solve_assignment(torch.where(inside, cost, cost + outside))
