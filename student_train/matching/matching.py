"""Vision token matching: who among the teacher's vision tokens is each student token's model?

The student has compressed its vision tokens, so positions no longer correspond. EM-KD asks
the two LM heads instead: tokens that *say* similar things over the vocabulary belong together,
and one assignment problem finds the pairing of least total cost,

    sigma = argmin over injective maps of  sum_j C[j, sigma(j)],

with C from `cost.py`. Injectivity is the point: the nearest teacher token of most student tokens
is one of a few hubs (docs/method.md), and only the constraint spreads them out. With N < M every
student token gets its own teacher token and M - N stay unused; with N > M it is the reverse.

Promise: index pairs, optimal up to the solver's float64, sorted by student token; no gradient; no
knowledge of any loss. `start_matching` takes the samples of a micro-batch, computes the costs of
alike problems (`problems.py`) together, and returns while threads solve them, so that other work
hides the solving; bits do not depend on that. Dimensions as in schema.py, B problems of n student
and m teacher tokens, p = min(n, m).
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from student_train.config.objective import MatchingConfig
from student_train.head.linear_head import LogitsOf
from student_train.matching.assignment import solve_assignment
from student_train.matching.certificate import certified_pairs
from student_train.matching.cost import CostError, cost_error, pair_costs, problems_at_once
from student_train.matching.problems import Problem, Problems, VisionTokens, find_problems, rows_of
from student_train.matching.separability import hubness, separability
from student_train.signals.teacher_signal import Signal
from teacher_cache.schema.samples import ViewGrid

_SOLVED_AT_ONCE = 2**16
"""Most costs whose problems one thread solves in one go, a single problem apart: a millisecond's
work, beside which handing it over takes nothing."""


class SolvedProblem(NamedTuple):
    """One assignment problem and its solution, by its own rows and columns; all on the CPU."""

    cost: Float[Tensor, "n m"]
    rows: Int[Tensor, " p"]
    columns: Int[Tensor, " p"]
    total_cost: float
    separability: float
    hubness: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Student token `student[i]` is matched to teacher token `teacher[i]`; no token twice.

    For diagnostics, `problems` keeps each problem that was solved, with its costs. `certified` says
    which pairs are provably those of the exact costs, where `MatchingConfig.certify` asked for it.
    """

    student: Int[Tensor, " P"]
    teacher: Int[Tensor, " P"]
    num_student: int
    num_teacher: int
    total_cost: float
    problems: tuple[SolvedProblem, ...] = field(repr=False)
    certified: Bool[Tensor, " P"] | None = None

    @property
    def num_pairs(self) -> int:
        """Matched pairs."""
        return self.student.shape[0]

    @property
    def mean_cost(self) -> float:
        """Cost of the average pair; 0 without pairs."""
        return self.total_cost / max(1, self.num_pairs)

    @property
    def unmatched_students(self) -> Int[Tensor, " U"]:
        """Student tokens without a partner: none unless some problem has N > M."""
        free = torch.ones(self.num_student, dtype=torch.bool, device=self.student.device)
        free[self.student] = False
        return free.nonzero()[:, 0]


class Matching(NamedTuple):
    """The assignments of a micro-batch, and what is known of its samples together."""

    samples: list[Assignment]
    teacher_rows: Int[Tensor, " P"]
    """Of all pairs, sample by sample, among the rows of all teachers."""
    mean_logits: Float[Tensor, " N"] | None
    """What `Costs` says of the student tokens, in any order; None where states were compared."""


class _Task(NamedTuple):
    """Some problems of one shape: what a thread needs to solve them."""

    numbers: list[int]
    cost: Float[Tensor, "B n m"]
    copied: torch.cuda.Event | None
    """After which the costs are there; None: they are."""
    errors: Sequence[CostError | None]
    student_rows: Int[Tensor, "B n"]
    teacher_rows: Int[Tensor, "B m"]


class _Solution(NamedTuple):
    """The solved problems by their numbers, and the rows of all their pairs; on the CPU."""

    problems: dict[int, SolvedProblem]
    students: Int[Tensor, " P"]
    teachers: Int[Tensor, " P"]
    certified: Bool[Tensor, " P"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingMatching:
    """Matchings that are being solved; `result` waits for them."""

    device: torch.device
    problems: Problems = field(repr=False)
    solutions: list[Future[_Solution]] = field(repr=False)
    mean_logits: Float[Tensor, " N"] | None = field(repr=False)

    def result(self) -> Matching:
        """The matchings; ValueError where costs are not finite. May be asked more than once."""
        found = [solution.result() for solution in self.solutions]
        none = torch.empty(0, dtype=torch.int64)
        student_P = torch.cat([none, *(each.students for each in found)])
        teacher_P = torch.cat([none, *(each.teachers for each in found)])
        proofs = [each.certified for each in found if each.certified is not None]
        order_P = student_P.argsort()
        solved = {number: each for part in found for number, each in part.problems.items()}
        of_sample: list[list[SolvedProblem]] = [[] for _ in self.problems.num_student]
        for number, problem in enumerate(self.problems.all):
            of_sample[problem.sample].append(solved[number])
        num_pairs = [sum(each.rows.shape[0] for each in problems) for problems in of_sample]
        sample_P = torch.arange(len(num_pairs)).repeat_interleave(torch.tensor(num_pairs))

        def of_each(rows_P: Tensor, sizes: list[int]) -> Sequence[Tensor]:
            """Rows in order, as each sample counts its own."""
            first_S = torch.tensor([0, *accumulate(sizes)])
            return (rows_P[order_P] - first_S[sample_P]).to(self.device).split(num_pairs)

        students = of_each(student_P, self.problems.num_student)
        teachers = of_each(teacher_P, self.problems.num_teacher)
        certified: Sequence[Tensor | None] = [None] * len(num_pairs)
        if proofs:
            certified = torch.cat(proofs)[order_P].to(self.device).split(num_pairs)
        samples = [
            Assignment(
                student=students[sample],
                teacher=teachers[sample],
                num_student=self.problems.num_student[sample],
                num_teacher=self.problems.num_teacher[sample],
                total_cost=sum(problem.total_cost for problem in problems),
                problems=tuple(problems),
                certified=certified[sample],
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
    """Pair the N vision tokens of a student with the M of its teacher, for one sample.

    The student's logits may be given or be left to the head, which is asked for what costs need.
    The views say which rows belong together, in row order; `student_kept` which of the tokens of
    the student's views its rows are, ascending, where it has dropped others. ValueError where the
    two sides do not show the same views (or, for scope=global, images), where the record cannot
    serve the metric, and where costs are not finite.
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
    """Compute the costs, and let threads solve the assignments while the caller goes on.

    `student_hidden`, `teacher` (and logits, where they are given) hold the rows of all samples, one
    sample after another. For each as `match_tokens`; which problems are computed together follows
    from their sizes alone. A ValueError over costs that are not finite comes with the result.
    Costs leave their device once, without waiting for it; what was passed in may be freed or
    changed at once.
    """
    problems = find_problems(samples, config.scope)
    assert sum(problems.num_student) == len(student_hidden)
    assert sum(problems.num_teacher) == teacher.num_rows
    logits = student_logits
    means: list[Tensor] = []
    solutions: list[Future[_Solution]] = []
    for numbers in _alike(problems.all, teacher, config):
        alike = [problems.all[number] for number in numbers]
        own = rows_of([span for problem in alike for span in problem.student])
        theirs = rows_of([span for problem in alike for span in problem.teacher])
        signal = teacher.rows(theirs)
        cost, mean_logits = pair_costs(
            student_hidden[own],
            logits[own] if isinstance(logits, Tensor) else logits,
            signal,
            config,
            len(alike),
        )
        if mean_logits is not None:
            means.append(mean_logits.flatten())
        task = _Task(
            numbers,
            *_to_host(cost),
            _errors(signal, config, cost),
            _numbered(own).view(len(alike), -1),
            _numbered(theirs).view(len(alike), -1),
        )
        solutions += [_solvers().submit(_solve, part) for part in _parts(task)]
    return PendingMatching(
        device=student_hidden.device,
        problems=problems,
        solutions=solutions,
        mean_logits=torch.cat(means) if means else None,
    )


def _alike(
    problems: Sequence[Problem], teacher: Signal, config: MatchingConfig
) -> Iterator[list[int]]:
    """The numbers of problems of one shape, as many as are to be computed together."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for number, problem in enumerate(problems):
        by_shape.setdefault(problem.shape, []).append(number)
    for shape, numbers in by_shape.items():
        size = problems_at_once(*shape, teacher, config)
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def _numbered(rows: slice | Tensor) -> Tensor:
    return rows if isinstance(rows, Tensor) else torch.arange(rows.start, rows.stop)


def _errors(
    teacher: Signal, config: MatchingConfig, cost: Float[Tensor, "B n m"]
) -> Sequence[CostError | None]:
    """The bounds of each problem's costs, where pairs are to be certified."""
    if not config.certify:
        return [None] * len(cost)
    error = cost_error(teacher, config, cost.dtype)
    absolute = error.absolute.view(len(cost), -1)
    return [CostError(relative=error.relative, absolute=each) for each in absolute]


def _parts(task: _Task) -> Iterator[_Task]:
    """Many small problems at a time, large ones each alone."""
    size = max(1, _SOLVED_AT_ONCE // task.cost[0].numel())
    for start in range(0, len(task.numbers), size):
        part = slice(start, start + size)
        yield task._replace(
            numbers=task.numbers[part],
            cost=task.cost[part],
            errors=task.errors[part],
            student_rows=task.student_rows[part],
            teacher_rows=task.teacher_rows[part],
        )


@cache
def _solvers() -> ThreadPoolExecutor:
    """Threads for the solvers, which let go of Python's lock."""
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
    found = [solve_assignment(cost) for cost in task.cost]
    rows_Bp, columns_Bp = (torch.stack(side) for side in zip(*found, strict=True))
    which_B1 = torch.arange(len(found))[:, None]
    paired_Bp = task.cost[which_B1, rows_Bp, columns_Bp]
    parts = zip(
        task.cost.unbind(),
        rows_Bp.unbind(),
        columns_Bp.unbind(),
        paired_Bp.sum(dim=1, dtype=torch.float64).tolist(),
        separability(task.cost).tolist(),
        hubness(task.cost).tolist(),
        strict=True,
    )
    solved = dict(zip(task.numbers, map(SolvedProblem._make, parts), strict=True))
    proofs = [
        certified_pairs(problem.cost, error.of(problem.cost), problem.rows, problem.columns)
        for problem, error in zip(solved.values(), task.errors, strict=True)
        if error is not None
    ]
    return _Solution(
        solved,
        task.student_rows.gather(1, rows_Bp).flatten(),
        task.teacher_rows.gather(1, columns_Bp).flatten(),
        torch.cat(proofs) if proofs else None,
    )
