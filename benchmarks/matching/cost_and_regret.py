"""Costs of matching: time, peak memory and what each loses, against the exact cost, in one run.

    python -m benchmarks.matching.cost_and_regret [--goals] [--all] [--large] [--images 12]
        [--json PATH]

`cdist` is `torch.cdist(p=1)` over whole rows and `bcast` is `(s[:, None] - t).abs().sum(2)`, both
timed on a few pairs and scaled; `strips` is the same sum by `l1_distances`, the exact cost that the
others are held against. These three are given all logits of both sides; `strips, states` starts
where the other lines do, and `student's logits` is what both must compute. The others are
`cost_matrix`, from the student's states and head and the teacher's record on: what they need of
either is computed in their time, but for `given`, where the student's logits are there. Regret is
the excess of a matching's exact cost over the optimum, as a share of a random matching's excess,
and equal the share of pairs that are the optimum's, means over two images (with the mean's standard
error), at the goals' shape over `--images`. Models and images are
made up (vision_field.py). One thread; processor time, the best of some rounds, of the first image;
memory is what a call adds to the resident set at its peak. Needs Linux, and 6 GiB. Ten minutes;
`--all` and `--large` take several times as long.
"""

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from statistics import stdev

import torch
from torch import Tensor

from benchmarks.synthetic.memory import status_mib
from benchmarks.synthetic.vision_states import WIDTH, Models, Problem
from student_train.config.objective import MatchingConfig, MatchMetric
from student_train.matching.assignment import solve_assignment
from student_train.matching.certificate import prove_pairs
from student_train.matching.cost import cost_matrix
from student_train.matching.cost_error import cost_error
from student_train.matching.quality import hubness, separability
from student_train.ops.l1 import l1_distances
from student_train.signals.teacher_signal import Signal

Grids = tuple[tuple[int, int], tuple[int, int]]
SMALL: Grids = (12, 12), (24, 24)
GOAL: Grids = (12, 12), (27, 27)
MORE: Grids = (14, 14), (27, 27)
LARGE: Grids = (24, 24), (48, 60)
DEFAULT_CELLS = [(32_064, grids) for grids in (SMALL, GOAL, MORE)] + [(151_936, GOAL)]
OTHER_CELLS = [(151_936, SMALL), (151_936, MORE)]
LARGE_CELLS = [(32_064, LARGE), (151_936, LARGE)]
TOP_KS, MORE_TOP_KS, RANKS = (64, 16, 256), (64, 16, 32, 128, 256), (128, 256)
NUM_IDS = (2048, 3072, 4096, 8192)
DEFAULT_IDS, GOAL_VOCAB = MatchingConfig().num_shared_ids, 151_936
LOGITS, SAME_START, GIVEN = "student's logits", "prob strips, states", "prob top-64, given"


@dataclass(kw_only=True)
class Line:
    """One line of the table; regret and equal share, image by image."""

    seconds: float
    peak_mib: float
    regrets: list[float] = field(default_factory=list[float])
    equals: list[float] = field(default_factory=list[float])

    @property
    def regret(self) -> float:
        """Mean over images."""
        return sum(self.regrets) / max(1, len(self.regrets))

    @property
    def regret_error(self) -> float:
        """Standard error of that mean; infinite for one image."""
        return stdev(self.regrets) / len(self.regrets) ** 0.5 if len(self.regrets) > 1 else inf

    @property
    def equal(self) -> float:
        """Mean over images."""
        return sum(self.equals) / max(1, len(self.equals))


def measure(compute: Callable[[], Tensor], rounds: int) -> tuple[Tensor, Line]:
    """The result, processor seconds and the peak's MiB above what was there."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, best = status_mib("VmRSS"), float("inf")
    result, peak = torch.empty(0), 0.0
    for number in range(rounds):
        start = time.thread_time()
        result = compute()
        best = min(best, time.thread_time() - start)
        if not number:
            peak = status_mib("VmHWM") - before
    return result, Line(seconds=best, peak_mib=max(0.0, peak))


def compare(cost: Tensor, exact: Tensor) -> tuple[float, float]:
    """Regret and share of equal pairs of the matching by `cost`, under `exact`."""
    wide = exact.double()
    rows, columns = solve_assignment(cost)
    best_rows, best_columns = solve_assignment(exact)
    least = float(wide[best_rows, best_columns].sum())
    excess = float(wide[rows, columns].sum()) - least
    equal = float((columns == best_columns).double().mean())
    return excess / (float(wide.mean()) * len(rows) - least), equal


def ways(problem: Problem, more: bool) -> dict[str, Callable[[], Tensor]]:
    """Every cost that starts from the student's states and head."""

    def way(teacher: Signal, metric: MatchMetric, num_ids: int | None = None):
        config = MatchingConfig(metric=metric, num_shared_ids=num_ids)
        hidden, head = problem.student_hidden, problem.student_head
        return lambda: cost_matrix(hidden, head, teacher, config)

    found = {"raw hidden, all V": way(problem.hidden, "raw_l1")} if more else {}
    for num_ids in NUM_IDS:
        if more or num_ids == DEFAULT_IDS:
            found[f"raw hidden, {num_ids}"] = way(problem.hidden, "raw_l1", num_ids)
        for rank, signal in problem.sketches.items():
            found[f"raw sketch {rank}, {num_ids}"] = way(signal, "raw_l1", num_ids)
    for top_k, signal in problem.top_ks.items():
        found[f"prob top-{top_k}"] = way(signal, "prob_l1")
    config, logits = MatchingConfig(metric="prob_l1"), problem.student_logits
    found[GIVEN] = lambda: cost_matrix(problem.student_hidden, logits, problem.top_ks[64], config)
    return found


def dense_from_states(problem: Problem) -> Tensor:
    """L1 of probabilities from the student's states and the record, whose rows are filled in."""
    student, signal = problem.student_logits.softmax(dim=1), problem.top_ks[64]
    share = signal.record.log_tail.exp() / (signal.vocab_size - signal.counts)
    teacher = share[:, None].repeat(1, signal.vocab_size)
    teacher.scatter_(1, signal.record.ids.long(), signal.kept_log_probs().exp())
    return l1_distances(student, teacher)


def measure_baselines(student: Tensor, teacher: Tensor) -> dict[str, Line]:
    """What there is without this project's code, on a few pairs."""
    pairs = len(student) * len(teacher)
    few = student[:24].contiguous(), teacher[:48].contiguous()
    _, cdist = measure(lambda: torch.cdist(*few, p=1), 1)
    cdist.seconds *= pairs / (24 * 48)
    cdist.peak_mib = pairs * 4 / 2**20
    one = student[:4], teacher[:16]
    _, broadcast = measure(lambda: (one[0][:, None] - one[1]).abs().sum(dim=2), 2)
    broadcast.seconds *= pairs / (4 * 16)
    broadcast.peak_mib = 2 * pairs * student.shape[1] * 4 / 2**20
    return {"raw bcast": broadcast, "raw cdist": cdist}


def measure_cell(
    problems: Iterable[Problem], more: bool, rounds: int, num_threads: int
) -> dict[str, Line]:
    """Every line of one shape: times of the first problem, quality of all, of others in threads."""
    found: dict[str, Line] = {}
    for number, problem in enumerate(problems):
        torch.set_num_threads(num_threads if number else 1)
        student, teacher = problem.student_logits, problem.hidden.dense_logits()
        if not number:
            found |= measure_baselines(student, teacher)
        raw, line = measure(lambda s=student, t=teacher: l1_distances(s, t), 1)
        found.setdefault("raw strips", line)
        student, teacher = student.softmax(dim=1), teacher.softmax(dim=1)
        prob, line = measure(lambda s=student, t=teacher: l1_distances(s, t), 1)
        found.setdefault("prob strips", line)
        for name in ("raw bcast", "raw cdist", "raw strips"):
            note(found[name], raw, raw)
        note(found["prob strips"], prob, prob)
        del student, teacher
        if not number:
            _, found[LOGITS] = measure(lambda p=problem: p.student_logits, rounds)
            cost, found[SAME_START] = measure(lambda p=problem: dense_from_states(p), 1)
            note(found[SAME_START], cost, prob)
        for name, compute in ways(problem, more).items():
            cost, line = measure(compute, 1 if number or name.endswith("V") else rounds)
            note(found.setdefault(name, line), cost, prob if name.startswith("prob") else raw)
        if not number:
            describe(problem, raw, prob)
    return found


def note(line: Line, cost: Tensor, exact: Tensor) -> None:
    """Add one image's quality."""
    regret, equal = compare(cost, exact)
    line.regrets.append(regret)
    line.equals.append(equal)


def describe(problem: Problem, raw: Tensor, prob: Tensor) -> None:
    """How hard the problem is, and what a certificate can say of it."""
    top_k = problem.top_ks[64]
    config = MatchingConfig(metric="prob_l1")
    sparse = cost_matrix(problem.student_hidden, problem.student_head, top_k, config)
    error = cost_error(top_k, config, sparse.dtype).of(sparse)
    sure = prove_pairs(sparse, error, *solve_assignment(sparse))
    log_probs = problem.hidden.dense_logits().log_softmax(1)
    entropy = -(log_probs.exp() * log_probs).sum(1).mean()
    tail = top_k.record.log_tail.exp()
    start = time.thread_time()
    solve_assignment(raw)
    print(
        f"  teacher entropy {entropy:.2f} nats, tail mass of top-64 {tail.mean():.4f} "
        f"(most {tail.max():.3f}); separability raw {separability(raw):.2f} "
        f"prob {separability(prob):.2f}; hubness {hubness(raw):.2f} {hubness(prob):.2f}; "
        f"prob pairs certified {float(sure.double().mean()):.0%}; "
        f"solving takes {(time.thread_time() - start) * 1e3:.1f} ms"
    )


def print_table(found: dict[str, Line]) -> None:
    """Seconds, ratios to the dense ways, memory and quality.

    Costs of probabilities from states are held against strips that start there too.
    """
    print(f"  {'':22s} {'time':>10s} {'x bcast':>7s} {'x cdist':>7s} {'x strips':>8s}", end="")
    print(f" {'memory':>11s} {'regret':>17s} {'equal':>6s}")
    bcast, cdist = found["raw bcast"].seconds, found["raw cdist"].seconds
    for name, line in found.items():
        dense = found["raw strips"]
        if name.startswith("prob"):
            dense = found["prob strips" if name in ("prob strips", GIVEN) else SAME_START]
        error = f" +- {line.regret_error:.3%}" if line.regret_error < inf else ""
        quality = f"{line.regret:8.3%}{error:10s} {line.equal:6.1%}" if line.regrets else ""
        print(
            f"  {name:22s} {line.seconds:8.3f} s {bcast / line.seconds:7.1f} "
            f"{cdist / line.seconds:7.1f} {dense.seconds / line.seconds:8.1f} "
            f"{line.peak_mib:7.0f} MiB {quality}",
            flush=True,
        )


def print_goals(found: dict[str, Line]) -> None:
    """The project's goals, for every number of shared ids; regret with its standard error."""
    cdist, raw = found["raw cdist"].seconds, found["raw strips"].seconds
    for num_ids in NUM_IDS:
        for rank, most in ((128, 0.01), (256, 0.005)):
            line = found[f"raw sketch {rank}, {num_ids}"]
            fast, faster = raw / line.seconds, cdist / line.seconds
            print(
                f"goal, sketch {rank} at {num_ids} ids: {fast:.1f} of 20 x strips, {faster:.0f} of "
                f"100 x cdist: {'met' if fast >= 20 and faster >= 100 else 'missed'}; "
                f"{judged(line, most)}"
            )
    dense, same = found["prob strips"].seconds, found[SAME_START].seconds
    for name, strips in ((GIVEN, dense), ("prob top-64", same)):
        line = found[name]
        fast = strips / line.seconds
        print(
            f"goal, {name}: {fast:.1f} of 20 x strips from the same start: "
            f"{'met' if fast >= 20 else 'missed'}; {judged(line, 0.001)} (tail mass <= 0.02)"
        )
    most = same / found[LOGITS].seconds
    print(f"(from the student's states no way is more than {most:.1f} x strips: its logits alone)")


def judged(line: Line, most: float) -> str:
    """The regret beside its goal; a goal within the standard error is neither met nor missed."""
    verdict = "met" if line.regret <= most else "missed"
    if abs(line.regret - most) < line.regret_error:
        verdict = "cannot be told"
    return f"regret {line.regret:.3%} +- {line.regret_error:.3%} of {most:.1%}: {verdict}"


def main() -> None:
    """Print the tables; with --json also write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="all vocabularies, shapes, k and ways")
    parser.add_argument("--large", action="store_true", help="576 x 2880 as well")
    parser.add_argument("--goals", action="store_true", help="the goals' vocabulary and shape only")
    parser.add_argument("--quick", action="store_true", help="one small vocabulary and shape")
    parser.add_argument("--images", type=int, default=12, help="whose quality is averaged")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    options = parser.parse_args()
    num_threads = torch.get_num_threads()
    cells = DEFAULT_CELLS + OTHER_CELLS * options.all + LARGE_CELLS * options.large
    if options.goals:
        cells = [(GOAL_VOCAB, GOAL)]
    if options.quick:
        cells = [(8_000, ((6, 6), (12, 12)))]
    report: list[dict[str, object]] = []
    for vocab_size in sorted({vocab_size for vocab_size, _ in cells}):
        models = Models.make(vocab_size, max(RANKS))
        for student, teacher in [grids for size, grids in cells if size == vocab_size]:
            top_ks = MORE_TOP_KS if options.all else TOP_KS
            is_goal = (vocab_size, (student, teacher)) == (GOAL_VOCAB, GOAL)
            problems = (
                Problem.make(models, student, teacher, top_ks, RANKS, image)
                for image in range(options.images if is_goal else min(2, options.images))
            )
            shape = student[0] * student[1], teacher[0] * teacher[1]
            print(f"\nV = {vocab_size}, N x M = {shape[0]} x {shape[1]}, width {WIDTH}")
            rounds = 1 if options.quick else 3
            found = measure_cell(problems, options.all, rounds, num_threads)
            print_table(found)
            lines = {name: vars(line) for name, line in found.items()}
            report.append({"vocab_size": vocab_size, "shape": shape, "costs": lines})
            if is_goal:
                print_goals(found)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
