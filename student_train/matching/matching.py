"""Matches student vision tokens to teacher vision tokens (EM-KD: vision token matching).

    sigma = argmin over injective maps of  sum_j C[j, sigma(j)]

Injectivity matters: most student tokens have one of a few teacher tokens nearest (docs/method.md).
With N < M each student token gets its own teacher token and M - N stay unused; with N > M the
reverse.

`match` in `losses/reference.py` has the definition. This file equals it and adds three things:
costs come from the LM head and the cached record without N x V or M x V logits (`cost.py`), views
of one shape are computed together (`problems.py`), and threads solve the assignments while the
caller goes on. Read reference.py, problems.py, cost.py, assignment.py, then this file;
cost_error.py and certificate.py, for the option `MatchingConfig.certify`, can be skipped.

`MatchingConfig.correspondence` may replace the assignment by another way to pair tokens
(`correspondences/`); the default is the paper's.

Promise: index pairs, optimal up to the solver's float64, sorted by student token; no gradient;
independent of thread timing. Dimensions as in teacher_output.py, B problems of n student and m
teacher tokens, p = min(n, m).
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from student_train.config.objective import MatchingConfig
from student_train.head.linear_head import LogitsOf
from student_train.matching.assignment import Assignment, SolvedProblem
from student_train.matching.certificate import prove_pairs
from student_train.matching.correspondences.pairing import PairingProblem
from student_train.matching.correspondences.table import CORRESPONDENCES
from student_train.matching.cost import pair_costs, problems_at_once
from student_train.matching.cost_error import CostError, cost_errors
from student_train.matching.problems import Problem, Problems, VisionTokens, find_problems, rows_of
from student_train.matching.quality import hubness, pair_places, separability
from student_train.signals.teacher_signal import Signal
from teacher_cache.schema.samples import ViewGrid

_SOLVED_AT_ONCE = 2**16
"""Most costs of small problems that one thread solves in one call: about a millisecond of work,
beside which the hand-over is negligible. A larger problem is solved alone."""


class Matching(NamedTuple):
    """The assignments of a micro-batch, and what holds for its samples together."""

    samples: list[Assignment]
    teacher_rows: Int[Tensor, " P"]
    """Teacher row of each pair, sample by sample, among the rows of all samples."""
    mean_logits: Float[Tensor, " N"] | None
    """`Costs.mean_logits` of all student tokens, in any order; None where states were compared."""


class _Task(NamedTuple):
    """Problems of one shape, for a thread to solve."""

    numbers: list[int]
    cost: Float[Tensor, "B n m"]
    copied: torch.cuda.Event | None
    """The event after which the costs are on the host; None: they are there."""
    errors: Sequence[CostError | None]
    student_rows: Int[Tensor, "B n"]
    teacher_rows: Int[Tensor, "B m"]
    problems: Sequence[Problem]
    config: MatchingConfig


class _Solution(NamedTuple):
    """The solved problems by their numbers, and the rows of all their pairs; on the CPU."""

    problems: dict[int, SolvedProblem]
    students: Int[Tensor, " P"]
    teachers: Int[Tensor, " P"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingMatching:
    """Matchings that threads are solving; `result` waits for them."""

    device: torch.device
    problems: Problems = field(repr=False)
    solutions: list[Future[_Solution]] = field(repr=False)
    mean_logits: Float[Tensor, " N"] | None = field(repr=False)

    def result(self) -> Matching:
        """Return the matchings; ValueError where costs are not finite. May be called again."""
        found = [solution.result() for solution in self.solutions]
        none = torch.empty(0, dtype=torch.int64)
        student_P = torch.cat([none, *(each.students for each in found)])
        teacher_P = torch.cat([none, *(each.teachers for each in found)])
        order_P = student_P.argsort()
        solved = {number: each for part in found for number, each in part.problems.items()}
        of_sample: list[list[SolvedProblem]] = [[] for _ in self.problems.num_student]
        for number, problem in enumerate(self.problems.all):
            of_sample[problem.sample].append(solved[number])
        num_pairs = [sum(each.rows.shape[0] for each in problems) for problems in of_sample]
        sample_P = torch.arange(len(num_pairs)).repeat_interleave(torch.tensor(num_pairs))

        def of_each(rows_P: Tensor, sizes: list[int]) -> Sequence[Tensor]:
            """Split rows of the batch by sample, counted from the sample's first row."""
            first_S = torch.tensor([0, *accumulate(sizes)])
            return (rows_P[order_P] - first_S[sample_P]).to(self.device).split(num_pairs)

        students = of_each(student_P, self.problems.num_student)
        teachers = of_each(teacher_P, self.problems.num_teacher)
        samples = [
            Assignment(
                student=students[sample],
                teacher=teachers[sample],
                num_student=self.problems.num_student[sample],
                num_teacher=self.problems.num_teacher[sample],
                problems=tuple(problems),
            )
            for sample, problems in enumerate(of_sample)
        ]
        return Matching(samples, teacher_P[order_P].to(self.device), self.mean_logits)


def match_tokens(
    student_hidden: Float[Tensor, "N D"],
    student_logits: Float[Tensor, "N W"] | LogitsOf | None,
    student_views: Sequence[ViewGrid],
    teacher: Signal,
    teacher_views: Sequence[ViewGrid],
    config: MatchingConfig,
    student_kept: Int[Tensor, " N"] | None = None,
) -> Assignment:
    """Match the N student vision tokens of one sample to the M of its teacher.

    `student_logits` are the logits or the head that computes those that the costs need. The views
    say which rows belong together, in row order. `student_kept`: ascending numbers, among the
    tokens of the student's views, of those that are left. ValueError where the two sides show
    different views (for scope=global: images), where the record cannot serve the metric, and where
    costs are not finite.
    """
    sample = VisionTokens(student_views, teacher_views, student_kept)
    pending = start_matching([sample], student_hidden, student_logits, teacher, config)
    return pending.result().samples[0]


@torch.no_grad()
def start_matching(
    samples: Sequence[VisionTokens],
    student_hidden: Float[Tensor, "N D"],
    student_logits: Float[Tensor, "N W"] | LogitsOf | None,
    teacher: Signal,
    config: MatchingConfig,
) -> PendingMatching:
    """Compute the costs and let threads solve the assignments while the caller goes on.

    As `match_tokens` for each sample. `student_hidden`, `teacher` and logits, where given, hold the
    rows of all samples, one sample after another. Inputs may be freed or changed on return. Costs
    that are not finite raise ValueError in `result`.
    """
    problems = find_problems(samples, config.scope)
    assert sum(problems.num_student) == len(student_hidden)
    assert sum(problems.num_teacher) == teacher.num_rows
    logits = student_logits
    means: list[Tensor] = []
    solutions: list[Future[_Solution]] = []
    for numbers in _groups_of_one_shape(problems.all, teacher, config):
        group = [problems.all[number] for number in numbers]
        own = rows_of([span for problem in group for span in problem.student])
        theirs = rows_of([span for problem in group for span in problem.teacher])
        signal = teacher.rows(theirs)
        cost, mean_logits = pair_costs(
            student_hidden[own],
            logits[own] if isinstance(logits, Tensor) else logits,
            signal,
            config,
            len(group),
        )
        if mean_logits is not None:
            means.append(mean_logits.flatten())
        task = _Task(
            numbers,
            *_to_host(cost),
            cost_errors(signal, config, cost),
            _numbered(own).view(len(group), -1),
            _numbered(theirs).view(len(group), -1),
            group,
            config,
        )
        solutions += [_solvers().submit(_solve, each) for each in _split(task)]
    return PendingMatching(
        device=student_hidden.device,
        problems=problems,
        solutions=solutions,
        mean_logits=torch.cat(means) if means else None,
    )


def _groups_of_one_shape(
    problems: Sequence[Problem], teacher: Signal, config: MatchingConfig
) -> Iterator[list[int]]:
    """Numbers of the problems whose costs are computed together."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for number, problem in enumerate(problems):
        by_shape.setdefault(problem.shape, []).append(number)
    for shape, numbers in by_shape.items():
        size = problems_at_once(*shape, teacher, config)
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def _numbered(rows: slice | Tensor) -> Tensor:
    return rows if isinstance(rows, Tensor) else torch.arange(rows.start, rows.stop)


def _split(task: _Task) -> Iterator[_Task]:
    """Several small problems in one task, large ones alone."""
    size = max(1, _SOLVED_AT_ONCE // task.cost[0].numel())
    for start in range(0, len(task.numbers), size):
        some = slice(start, start + size)
        yield task._replace(
            numbers=task.numbers[some],
            cost=task.cost[some],
            errors=task.errors[some],
            student_rows=task.student_rows[some],
            teacher_rows=task.teacher_rows[some],
            problems=task.problems[some],
        )


@cache
def _solvers() -> ThreadPoolExecutor:
    """Threads for SciPy's solver, which releases the interpreter lock."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="matching")


def _to_host(cost: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The costs on the CPU, and the event after which they are there (None: at once)."""
    if not cost.is_cuda:
        return cost, None
    on_host = torch.empty(cost.shape, dtype=cost.dtype, pin_memory=True)
    on_host.copy_(cost, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(cost.device))
    return on_host, copied


@torch.no_grad()
def _solve(task: _Task) -> _Solution:
    if task.copied is not None:
        task.copied.synchronize()
    weight, pair = task.config.place_weight, CORRESPONDENCES[task.config.correspondence]
    asked = [
        PairingProblem(cost, problem.geometry, problem.seed, weight)
        for cost, problem in zip(task.cost, task.problems, strict=True)
    ]
    pairs = [pair(each) for each in asked]
    rows_Bp, columns_Bp = (torch.stack(side) for side in zip(*pairs, strict=True))
    paired_Bp = task.cost[torch.arange(len(pairs))[:, None], rows_Bp, columns_Bp]
    fields = zip(
        task.cost.unbind(),
        rows_Bp.unbind(),
        columns_Bp.unbind(),
        paired_Bp.sum(dim=1, dtype=torch.float64).tolist(),
        separability(task.cost).tolist(),
        hubness(task.cost).tolist(),
        [
            None if error is None else prove_pairs(cost, error.of(cost), rows, columns)
            for cost, error, rows, columns in zip(
                task.cost, task.errors, rows_Bp, columns_Bp, strict=True
            )
        ],
        [pair_places(each, *found) for each, found in zip(asked, pairs, strict=True)],
        strict=True,
    )
    return _Solution(
        dict(zip(task.numbers, map(SolvedProblem._make, fields), strict=True)),
        task.student_rows.gather(1, rows_Bp).flatten(),
        task.teacher_rows.gather(1, columns_Bp).flatten(),
    )
