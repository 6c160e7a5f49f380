"""Pairs tokens by chance: the control of every claim about a correspondence."""

import numpy as np
import torch

from student_train.matching.correspondences.pairing import PairingProblem, Pairs


def chance(problem: PairingProblem) -> Pairs:
    """min(n, m) pairs drawn by the problem's seed, the same at every step; no token twice."""
    num_students, num_teachers = problem.cost.shape
    # Raw words of a fixed algorithm: `Generator.permutation` may change between versions.
    words = np.random.Philox(key=problem.seed).random_raw(num_students + num_teachers)
    students = torch.from_numpy(np.argsort(words[:num_students], kind="stable"))
    teachers = torch.from_numpy(np.argsort(words[num_students:], kind="stable"))
    num_pairs = min(num_students, num_teachers)
    rows, order = students[:num_pairs].sort()
    return rows, teachers[:num_pairs][order]
