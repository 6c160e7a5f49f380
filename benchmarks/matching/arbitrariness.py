"""Measures how constants added to the student's logits make a matching arbitrary.

    python -m benchmarks.matching.arbitrariness [--vocab 32064]

A constant added to all logits of a token changes no probability, and no loss trains it, but it
changes raw costs. `common` adds one constant to all tokens, `own` a different one to each (normal,
of the given spread). Near: share of student tokens whose partner is within 2.5 cells of their place
in the image. Equal: share of pairs that are the same without the constant. Models and images are
synthetic (benchmarks/synthetic/vision_states.py). One thread.
"""

import argparse

import torch
from torch import Tensor

from benchmarks.synthetic.vision_states import Models, Problem
from student_train.config.objective import MatchingConfig, MatchMetric
from student_train.matching.assignment import solve_assignment
from student_train.matching.cost import cost_matrix
from student_train.matching.quality import separability

STUDENT, TEACHER = (12, 12), (27, 27)
CONSTANTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
METRICS: tuple[MatchMetric, ...] = ("raw_l1", "centred_l1")


def places(grid: tuple[int, int]) -> Tensor:
    """Return the centre [N, 2] of every token, in cells of the teacher's grid."""
    axes = [(torch.arange(n) + 0.5) * t / n for n, t in zip(grid, TEACHER, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def share_near(columns: Tensor) -> float:
    """Return the share of student tokens, in order, whose partner is near their place."""
    apart = (places(STUDENT) - places(TEACHER)[columns]).norm(dim=1)
    return float((apart <= 2.5).double().mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocab", type=int, default=32_064)
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem = Problem.make(Models.make(options.vocab, 128), STUDENT, TEACHER, (64,), (128,))
    student, teacher = problem.student_logits, problem.sketches[128]
    own = torch.randn(len(student), 1, generator=torch.Generator().manual_seed(3))
    by_chance = sum(
        float((places(TEACHER) - place).norm(dim=1).le(2.5).double().mean())
        for place in places(STUDENT)
    ) / len(student)
    print(f"V = {options.vocab}; a random partner is near in {by_chance:.1%} of cases")
    print("metric     constant        separability   near  equal")
    for metric in METRICS:
        config = MatchingConfig(metric=metric)
        first: Tensor | None = None
        for kind in ("common", "own"):
            for constant in CONSTANTS:
                moved = student + constant * (own if kind == "own" else 1.0)
                cost = cost_matrix(moved[:, :1], moved, teacher, config)
                _, columns = solve_assignment(cost)
                first = columns if first is None else first
                equal = float((columns == first).double().mean())
                print(
                    f"{metric:10s} {kind:6s} {constant:5.1f} {separability(cost):13.3f} "
                    f"{share_near(columns):8.1%} {equal:6.1%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
