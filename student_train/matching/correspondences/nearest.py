"""Gives each student token the cheapest teacher token: what does injectivity add?"""

import torch

from student_train.matching.assignment import require_finite
from student_train.matching.correspondences.pairing import PairingProblem, Pairs


def nearest(problem: PairingProblem) -> Pairs:
    """One pair for each of the n student tokens; teacher tokens may occur several times."""
    require_finite(problem.cost)
    return torch.arange(len(problem.cost)), problem.cost.argmin(dim=1)
