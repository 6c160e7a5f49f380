"""The paper's correspondence (EM-KD: vision token matching): least total cost, no token twice."""

from student_train.matching.assignment import solve_assignment
from student_train.matching.correspondences.pairing import PairingProblem, Pairs


def hungarian(problem: PairingProblem) -> Pairs:
    """The min(n, m) pairs of least total cost."""
    return solve_assignment(problem.cost)
