"""What each tail policy makes of a divergence: its gradient and value beside the exact ones.

    python -m benchmarks.tails [--vocab 151936] [--json PATH]

Gradients are those by the student's states, cosine with the exact gradient, mean over 48 matched
pairs; values are shares of the exact value. `far` is a student as made up, `near` one whose logits
are 0.3 its own and 0.7 its teacher's, `early` one of almost flat logits (its own times 0.35). K is
64, the sketch's rank 128. The last lines are the bounds that a record gives whatever the policy.
Models and images are made up (benchmarks/vision_field.py). About a minute at V = 32,064.
"""

import argparse
import json
import math
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.vision_field import Models, Problem
from student_train.assignment import solve_assignment
from student_train.cost import cost_matrix
from student_train.divergence import DIVERGENCES
from student_train.objective import DivergenceName, MatchingConfig, TailPolicy
from student_train.signals import HiddenSignal
from student_train.tail_policies import STUDY_TAILS
from student_train.top_k_signal import TopKSignal

NUM_PAIRS, AT_ONCE, TOP_K, RANK = 48, 8, 64, 128
POLICIES: tuple[TailPolicy, ...] = get_args(TailPolicy)[1:]


def students(problem: Problem) -> tuple[dict[str, Tensor], TopKSignal, HiddenSignal]:
    """Three students' logits [P, V] and what faces them, by records and wholly known."""
    own, record = problem.student_logits, problem.sketches[RANK]
    config = MatchingConfig()
    rows, columns = solve_assignment(cost_matrix(own[:, :1], own, record, config))
    chosen = torch.linspace(0, len(rows) - 1, NUM_PAIRS).long()
    far, teacher = own[rows[chosen]], problem.hidden.rows(columns[chosen])
    near = 0.3 * far + 0.7 * teacher.dense_logits()
    return {"far": far, "near": near, "early": 0.35 * far}, record.rows(columns[chosen]), teacher


def compare(
    student: Tensor,
    record: TopKSignal,
    exact: HiddenSignal,
    head: Tensor,
    name: DivergenceName,
) -> dict[str, tuple[float, float]]:
    """By policy: cosine of gradients, share of the value; the bounds as shares alone."""
    measure = DIVERGENCES[name]
    cosines: dict[str, list[Tensor]] = {policy: [] for policy in POLICIES}
    values: dict[str, list[Tensor]] = {name: [] for name in ("true", "lower", "upper", *POLICIES)}
    for rows in torch.arange(len(student)).split(AT_ONCE):
        logits = student[rows].clone().requires_grad_()
        found = {"true": measure(logits, exact.rows(rows), "exact", 1.0, 0.5)}
        for policy in POLICIES:
            found[policy] = measure(logits, record.rows(rows), policy, 1.0, 0.5)
        values["lower"].append(found["bucket"].lower)
        values["upper"].append(found["bucket"].upper)
        by_states: dict[str, Tensor] = {}
        for label, divergence in found.items():
            (gradient,) = torch.autograd.grad(divergence.value.sum(), logits)
            by_states[label] = gradient @ head
            values[label].append(divergence.value.detach())
        for policy in POLICIES:
            pair = by_states[policy], by_states["true"]
            cosines[policy].append(functional.cosine_similarity(*pair, dim=1))
    true = float(torch.cat(values.pop("true")).sum())
    nothing = torch.tensor([torch.nan])
    return {
        label: (
            float(torch.cat(cosines.get(label, [nothing])).mean()),
            float(torch.cat(parts).sum()) / true,
        )
        for label, parts in values.items()
    }


def _cell(cosine: float, share: float) -> str:
    return f"{'' if math.isnan(cosine) else format(cosine, '.3f'):>8}{share:8.2f}"


def main() -> None:
    """Print the tables; with --json also write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocab", type=int, default=32_064)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = Models.make(options.vocab, RANK)
    problem = Problem.make(models, (12, 12), (24, 24), (TOP_K,), (RANK,))
    logits, record, exact = students(problem)
    report: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for name in get_args(DivergenceName):
        head = models.student_head.weight
        found = {label: compare(own, record, exact, head, name) for label, own in logits.items()}
        print(f"\n{name}, V = {options.vocab}: cosine of gradients, share of the exact value")
        print(f"{'':24}" + "".join(f"{label:>16}" for label in found))
        for line in (*POLICIES, "lower", "upper"):
            note = " (for study)" if line in STUDY_TAILS else ""
            note = " bound" if line in ("lower", "upper") else note
            cells = "".join(_cell(*found[student][line]) for student in found)
            print(f"{line + note:24}{cells}", flush=True)
        report[name] = found
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
