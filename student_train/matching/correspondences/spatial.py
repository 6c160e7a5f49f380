"""Weighs words against places: one assignment over costs and squared distances together."""

import torch

from student_train.matching.assignment import require_finite, solve_assignment
from student_train.matching.correspondences.pairing import PairingProblem, Pairs


def spatial(problem: PairingProblem) -> Pairs:
    """The least total of `cost / mean cost + place_weight * squared distance`, no token twice.

    Weight 0 is `hungarian`. In a grid of g x g student tokens neighbours are 1/g apart, so a weight
    of g^2 makes one token's step as dear as an average cost.
    """
    require_finite(problem.cost)
    cost = problem.cost.to(torch.float64)
    mean = cost.mean()
    scaled = cost / mean if mean > 0 else cost
    return solve_assignment(scaled + problem.place_weight * problem.places().distance.square())
