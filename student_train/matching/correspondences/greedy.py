"""Takes the cheapest pair that is left, again and again: how much does optimality matter?"""

import torch

from student_train.matching.assignment import require_finite
from student_train.matching.correspondences.pairing import PairingProblem, Pairs


def greedy(problem: PairingProblem) -> Pairs:
    """The min(n, m) pairs of least cost each, in turn; of equal ones the first; no token twice."""
    require_finite(problem.cost)
    num_students, num_teachers = problem.cost.shape
    free_teacher = [True] * num_teachers
    partner: dict[int, int] = {}
    for place in problem.cost.flatten().argsort(stable=True).tolist():
        student, teacher = divmod(place, num_teachers)
        if student not in partner and free_teacher[teacher]:
            partner[student], free_teacher[teacher] = teacher, False
            if len(partner) == min(num_students, num_teachers):
                break
    students = sorted(partner)
    return torch.tensor(students), torch.tensor([partner[student] for student in students])
