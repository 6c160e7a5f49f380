"""Costs of matching: time, peak memory and what each loses, against the exact cost, in one run.

    python -m benchmarks.matching [--vocab 32064 151936] [--large] [--quick] [--json PATH]

`cdist` is `torch.cdist(p=1)` over whole rows, timed on 24 x 48 pairs and scaled; `strips` is the
same sum by `l1_distances`, the exact cost over dense logits that the others are held against; the
other lines are `cost_matrix`. Regret is the excess of a matching's exact cost over the optimum, as
a share of a random matching's excess; equal is the share of pairs that are the optimum's. Models
and images are made up (benchmarks/vision_field.py). One thread; processor time, the best of some
rounds; memory is what a call adds to the resident set at its peak. Needs Linux, and 6 GiB.
"""

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.losses import status_mib
from benchmarks.vision_field import WIDTH, Models, Problem
from student_train.certificate import certified_pairs
from student_train.cost import cost_error, cost_matrix
from student_train.l1 import l1_distances
from student_train.matching import solve_assignment
from student_train.metrics import hubness, separability
from student_train.objective import MatchingConfig, MatchMetric
from student_train.signals import Signal

VOCABS = (32_064, 151_936)
GRIDS = (((12, 12), (24, 24)), ((12, 12), (27, 27)), ((14, 14), (27, 27)))
LARGE = ((24, 24), (48, 60))
TOP_K, RANKS = 64, (128, 256)
GOAL_VOCAB, GOAL_SHAPE = 151_936, (144, 729)


class Found(NamedTuple):
    """One line of the table."""

    seconds: float
    peak_mib: float
    regret: float
    equal: float


def measure(compute: Callable[[], Tensor], rounds: int) -> tuple[Tensor, float, float]:
    """The result, processor seconds and the peak's MiB above what was there."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, best = status_mib("VmRSS"), float("inf")
    cost, peak = torch.empty(0), 0.0
    for number in range(rounds):
        start = time.thread_time()
        cost = compute()
        best = min(best, time.thread_time() - start)
        if not number:
            peak = status_mib("VmHWM") - before
    return cost, best, max(0.0, peak)


def compare(cost: Tensor, exact: Tensor) -> tuple[float, float]:
    """Regret and share of equal pairs of the matching by `cost`, under `exact`."""
    wide = exact.double()
    rows, columns = solve_assignment(cost)
    best_rows, best_columns = solve_assignment(exact)
    least = float(wide[best_rows, best_columns].sum())
    excess = float(wide[rows, columns].sum()) - least
    equal = float((columns == best_columns).double().mean())
    return excess / (float(wide.mean()) * len(rows) - least), equal


def costs_of(
    student: Tensor, teacher: Signal, metric: MatchMetric, num_ids: int | None = None
) -> Callable[[], Tensor]:
    """`cost_matrix`, still to be called."""
    config = MatchingConfig(metric=metric, num_shared_ids=num_ids)
    return lambda: cost_matrix(student[:, :1], student, teacher, config)


def measure_problem(problem: Problem, quick: bool) -> dict[str, Found]:
    """Every line of one shape."""
    student, hidden = problem.student_logits, problem.hidden
    logits = hidden.dense_logits()
    num_students, num_teachers = len(student), len(logits)
    few = student[:24].contiguous(), logits[:48].contiguous()
    _, seconds, _ = measure(lambda: torch.cdist(*few, p=1), 1)
    scale = num_students * num_teachers / (len(few[0]) * len(few[1]))
    found: dict[str, Found] = {}

    def add(name: str, compute: Callable[[], Tensor], exact: Tensor | None, rounds: int) -> Tensor:
        cost, seconds, peak = measure(compute, rounds)
        found[name] = Found(seconds, peak, *compare(cost, cost if exact is None else exact))
        print_line(name, found[name], found)
        return cost

    found["raw cdist"] = Found(seconds * scale, num_students * num_teachers * 4 / 2**20, 0.0, 1.0)
    rounds = 1 if quick else 2
    raw = add("raw strips", lambda: l1_distances(student, logits), None, rounds)
    add("raw hidden, all V", costs_of(student, hidden, "raw_l1"), raw, 1)
    for num_ids in (2048, 4096, 8192):
        add(f"raw hidden, {num_ids}", costs_of(student, hidden, "raw_l1", num_ids), raw, 3)
        for rank, signal in problem.sketches.items():
            name = f"raw sketch {rank}, {num_ids}"
            add(name, costs_of(student, signal, "raw_l1", num_ids), raw, 3)

    def dense_probabilities() -> Tensor:
        return l1_distances(student.softmax(1), logits.softmax(1))

    exact = add("prob strips", dense_probabilities, None, 1)
    sparse = add(f"prob top-{TOP_K}", costs_of(student, problem.top_k, "prob_l1"), exact, 3)
    error = cost_error(problem.top_k, MatchingConfig(metric="prob_l1"), sparse.dtype).of(sparse)
    sure = certified_pairs(sparse, error, *solve_assignment(sparse))
    log_probs = logits.log_softmax(1)
    entropy = -(log_probs.exp() * log_probs).sum(1).mean()
    tail = problem.top_k.log_tail.exp()
    print(
        f"  teacher entropy {entropy:.2f} nats, tail mass {tail.mean():.4f} "
        f"(most {tail.max():.3f}); "
        f"separability raw {separability(raw):.2f} prob {separability(exact):.2f}; "
        f"hubness {hubness(raw):.2f} {hubness(exact):.2f}; "
        f"prob pairs certified {float(sure.double().mean()):.0%}"
    )
    return found


def print_line(name: str, line: Found, found: dict[str, Found]) -> None:
    """Seconds, ratios to both dense ways, memory and quality."""
    dense = found["prob strips" if name.startswith("prob") else "raw strips"].seconds
    print(
        f"  {name:22s} {line.seconds:8.3f} s {found['raw cdist'].seconds / line.seconds:7.1f} "
        f"{dense / line.seconds:7.1f} {line.peak_mib:8.0f} MiB "
        f"{line.regret:8.3%} {line.equal:6.1%}",
        flush=True,
    )


def print_goals(found: dict[str, Found]) -> None:
    """The project's goals, for every number of shared ids."""
    cdist, raw = found["raw cdist"].seconds, found["raw strips"].seconds
    for rank, most in ((128, 0.01), (256, 0.005)):
        for num_ids in (2048, 4096, 8192):
            line = found[f"raw sketch {rank}, {num_ids}"]
            fast, faster = raw / line.seconds, cdist / line.seconds
            met = fast >= 20 and faster >= 100 and line.regret <= most
            print(
                f"goal, sketch {rank} at {num_ids} ids: {fast:.1f} of 20 x strips, {faster:.0f} of "
                f"100 x cdist, regret {line.regret:.3%} of {most:.1%}: {'met' if met else 'missed'}"
            )
    line = found[f"prob top-{TOP_K}"]
    fast = found["prob strips"].seconds / line.seconds
    met = fast >= 20 and line.regret <= 0.001
    print(
        f"goal, top-{TOP_K} by probabilities: {fast:.1f} of 20 x strips, regret {line.regret:.3%} "
        f"of 0.1% (where the tail mass is <= 0.02): {'met' if met else 'missed'}",
        flush=True,
    )


def main() -> None:
    """Print the tables; with --json also write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABS)
    parser.add_argument("--large", action="store_true", help="576 x 2880 as well")
    parser.add_argument("--quick", action="store_true", help="one small vocabulary and shape")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    vocabs = (8_000,) if options.quick else options.vocab
    grids = (((6, 6), (12, 12)),) if options.quick else (*GRIDS, *((LARGE,) * options.large))
    report: list[dict[str, object]] = []
    for vocab_size in vocabs:
        models = Models.make(vocab_size, max(RANKS))
        for student_grid, teacher_grid in grids:
            problem = Problem.make(models, student_grid, teacher_grid, TOP_K, RANKS)
            shape = len(problem.student_logits), problem.hidden.num_rows
            print(f"\nV = {vocab_size}, N x M = {shape[0]} x {shape[1]}, width {WIDTH}")
            print(
                f"  {'':22s} {'time':>10s} {'x cdist':>7s} {'x strips':>7s} {'memory':>11s}", end=""
            )
            print(f" {'regret':>8s} {'equal':>6s}")
            found = measure_problem(problem, options.quick)
            lines = {name: line._asdict() for name, line in found.items()}
            report.append({"vocab_size": vocab_size, "shape": shape, "costs": lines})
            if (vocab_size, shape) == (GOAL_VOCAB, GOAL_SHAPE):
                print_goals(found)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
