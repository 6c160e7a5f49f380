"""Measures each tail policy: the gradient and value of a divergence beside the exact ones.

    python -m benchmarks.training.tails [--vocab 151936] [--top-k 64] [--text] [--json PATH]

Two flat tails are defined only here, to show why training does not offer them: `uniform` spreads
the tail's mass evenly, and `mean_logit` gives each entry the sketch's mean logit, whatever the sum.

Gradients are those of the student's states: cosine with the exact gradient, mean over matched
pairs. Values are shares of the exact value. `far` is the synthetic student, `near` has logits of
0.3 its own and 0.7 its teacher's, `early` has almost flat logits (its own times 0.35). The sketch's
rank is 128; the template is fitted to other images. The last lines are the record's bounds, which
do not depend on the policy. Models and images are synthetic (synthetic/vision_states.py); with
--text they are word statistics of real text (synthetic/text_model.py), which have no sketch. About
a minute at V = 32,064.
"""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.synthetic.text_model import TextProblem
from benchmarks.synthetic.vision_states import NUM_IMAGES, Models, Problem, field
from student_train.config.objective import DivergenceName, MatchingConfig, TailPolicy
from student_train.divergence.divergence import DIVERGENCES, Divergence
from student_train.divergence.student_rows import DenseRows
from student_train.divergence.tail_policies import TeacherLogProbs
from student_train.matching.assignment import solve_assignment
from student_train.matching.cost import cost_matrix
from student_train.signals.teacher_signal import DenseSignal, HiddenSignal
from student_train.signals.top_k import TopKSignal
from teacher_cache.records.tail_template import MeanTail

NUM_PAIRS, AT_ONCE, RANK = 48, 8, 128
POLICIES: tuple[TailPolicy, ...] = get_args(TailPolicy)[1:]
TEMPLATE = "blend, template"
FLAT_TAILS = ("uniform", "mean_logit")


class Case(NamedTuple):
    """Students' logits [P, V] by name, and the record behind each line of the table."""

    students: dict[str, Tensor]
    records: dict[str, TopKSignal]
    exact: HiddenSignal | DenseSignal
    head: Tensor
    """Of the student, [V, D]."""


def made_up(vocab_size: int, top_k: int) -> Case:
    """Matched vision tokens of an image, by a record with a sketch and by one with a template."""
    models = Models.make(vocab_size, RANK)
    problem = Problem.make(models, (12, 12), (24, 24), (top_k,), (RANK,))
    own, record = problem.student_logits, problem.sketches[RANK]
    rows, columns = solve_assignment(cost_matrix(own[:, :1], own, record, MatchingConfig()))
    chosen = torch.linspace(0, len(rows) - 1, NUM_PAIRS).long()
    far, teacher = own[rows[chosen]], problem.hidden.rows(columns[chosen])
    tails = MeanTail(vocab_size)
    for seed in range(100, 100 + NUM_IMAGES):  # the images that the sketch is fitted to
        tails.update(field(models.axes, 27, 27, seed)[::4], models.teacher_head, top_k)
    record = record.rows(columns[chosen])
    bare = replace(record, sketch=None, template=tails.log_shares)
    records = {"blend": record, TEMPLATE: bare}
    records |= {line: record for line in (*POLICIES, *FLAT_TAILS) if line != "blend"}
    return Case(
        _students(far, teacher.dense_logits()), records, teacher, models.student_head.weight
    )


def of_text(top_k: int) -> Case:
    """Held-out words, by records without a sketch."""
    problem = TextProblem.make(top_k)
    lines = (TEMPLATE, "bucket", "renormalise", "uniform")
    records: dict[str, TopKSignal] = dict.fromkeys(lines, problem.record)
    students = _students(problem.student_logits, problem.teacher.logits)
    return Case(students, records, problem.teacher, problem.head.weight)


def _students(far: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    return {"far": far, "near": 0.3 * far + 0.7 * teacher, "early": 0.35 * far}


def compare(student: Tensor, case: Case, name: DivergenceName) -> dict[str, tuple[float, float]]:
    """By line: cosine of gradients, share of the value; the bounds as shares alone."""
    measure = DIVERGENCES[name]
    cosines: dict[str, list[Tensor]] = {line: [] for line in case.records}
    lines = ("true", *case.records, "lower", "upper")
    values: dict[str, list[Tensor]] = {line: [] for line in lines}
    for rows in torch.arange(len(student)).split(AT_ONCE):
        logits = student[rows].clone().requires_grad_()
        found = {"true": measure(logits, case.exact.rows(rows), "exact", 1.0, 0.5)}
        for line, record in case.records.items():
            found[line] = _divergence(name, logits, record.rows(rows), line)
        values["lower"].append(found["bucket"].lower)
        values["upper"].append(found["bucket"].upper)
        by_states: dict[str, Tensor] = {}
        for line, divergence in found.items():
            (gradient,) = torch.autograd.grad(divergence.value.sum(), logits)
            by_states[line] = gradient @ case.head
            values[line].append(divergence.value.detach())
        for line in case.records:
            pair = by_states[line], by_states["true"]
            cosines[line].append(functional.cosine_similarity(*pair, dim=1))
    true = float(torch.cat(values.pop("true")).sum())
    nothing = torch.tensor([torch.nan])
    return {
        line: (
            float(torch.cat(cosines.get(line, [nothing])).mean()),
            float(torch.cat(parts).sum()) / true,
        )
        for line, parts in values.items()
    }


def _divergence(name: DivergenceName, logits: Tensor, record: TopKSignal, line: str) -> Divergence:
    """By the policy of a line of the table, or by a flat tail: [P, 1] for all its entries."""
    measure = DIVERGENCES[name]
    if line not in FLAT_TAILS:
        policy: TailPolicy = next(each for each in POLICIES if line.startswith(each))
        return measure(logits, record, policy, 1.0, 0.5)
    num_outside = record.vocab_size - record.counts
    entry = record.record.log_tail - num_outside.log()
    if line == "mean_logit":
        assert record.sketch is not None
        decoded = record.sketch.logits().scatter(1, record.record.ids.long(), 0.0)
        entry = decoded.sum(dim=1) / num_outside - record.record.logsumexp
    known = TeacherLogProbs(record.kept_log_probs(), record.record.log_tail, entry[:, None])
    return measure.of_rows(DenseRows(logits, record.record.ids), record, known, 1.0)


def _cell(cosine: float, share: float) -> str:
    return f"{'' if math.isnan(cosine) else format(cosine, '.3f'):>8}{share:8.2f}"


def _print(found: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    print(f"{'':24}" + "".join(f"{label:>16}" for label in found))
    for line in next(iter(found.values())):
        note = " (not offered)" if line in FLAT_TAILS else ""
        note = " bound" if line in ("lower", "upper") else note
        cells = "".join(_cell(*found[student][line]) for student in found)
        print(f"{line + note:24}{cells}", flush=True)


def main() -> None:
    """Print the tables; with --json also write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocab", type=int, default=32_064)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    case = of_text(options.top_k) if options.text else made_up(options.vocab, options.top_k)
    tail = float(case.records["bucket"].record.log_tail.exp().mean())
    print(f"V = {case.exact.vocab_size}, K = {options.top_k}, mean tail mass {tail:.4f}")
    report: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for name in get_args(DivergenceName):
        report[name] = {own: compare(each, case, name) for own, each in case.students.items()}
        print(f"\n{name}: cosine of gradients, share of the exact value")
        _print(report[name])
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
