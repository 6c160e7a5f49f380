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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, repeat
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from student_train.assignment import solve_assignment
from student_train.certificate import certified_pairs
from student_train.cost import CostError, Costs, cost_error, pair_costs, problems_at_once
from student_train.linear_head import LogitsOf
from student_train.objective import MatchingConfig, MatchSolver
from student_train.problems import Problem, Problems, VisionTokens, find_problems, rows_of
from student_train.signals import Signal
from teacher_cache.schema import ViewGrid

_SOLVED_AT_ONCE = 2**16
"""Most costs whose problems one thread solves in one go, a single problem apart: a millisecond's
work, beside which handing it over takes nothing."""


class SolvedProblem(NamedTuple):
    """One assignment problem and its solution, by its own rows and columns; costs on their device.

    `mean_logits` is what `Costs` says of its student tokens; None where states were compared.
    """

    cost: Float[Tensor, "n m"]
    rows: Int[Tensor, " p"]
    columns: Int[Tensor, " p"]
    total_cost: float
    mean_logits: Float[Tensor, " n"] | None


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
        return len(self.student)

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
    """The assignments of a micro-batch, and the teachers' rows of all pairs, sample by sample."""

    samples: list[Assignment]
    teacher_rows: Int[Tensor, " P"]


class _Solution(NamedTuple):
    """Of some problems of one shape, in their own rows and columns; all on the CPU."""

    rows: Int[Tensor, "B p"]
    columns: Int[Tensor, "B p"]
    totals: list[float]
    certified: Bool[Tensor, "B p"] | None


class _Group(NamedTuple):
    """Problems of one shape, by their numbers, whose costs were computed together."""

    numbers: list[int]
    student_rows: Int[Tensor, "B n"]
    teacher_rows: Int[Tensor, "B m"]
    costs: Costs
    solutions: list[Future[_Solution]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingMatching:
    """Matchings that are being solved; `result` waits for them."""

    device: torch.device
    problems: Problems = field(repr=False)
    groups: list[_Group] = field(repr=False)

    def result(self) -> Matching:
        """The matchings; ValueError where costs are not finite. May be asked more than once."""
        students, teachers = ([torch.empty(0, dtype=torch.int64)] for _ in range(2))
        proofs: list[Tensor] = []
        solved: dict[int, SolvedProblem] = {}
        for group in self.groups:
            found = [solution.result() for solution in group.solutions]
            rows_Bp = torch.cat([each.rows for each in found])
            columns_Bp = torch.cat([each.columns for each in found])
            students.append(group.student_rows.gather(1, rows_Bp).flatten())
            teachers.append(group.teacher_rows.gather(1, columns_Bp).flatten())
            proofs += [each.certified.flatten() for each in found if each.certified is not None]
            cost_Bnm, mean_Bn = group.costs
            parts = zip(
                cost_Bnm.unbind(),
                rows_Bp.unbind(),
                columns_Bp.unbind(),
                (total for each in found for total in each.totals),
                repeat(None) if mean_Bn is None else mean_Bn.unbind(),
                strict=False,  # one of them may be endless
            )
            solved.update(zip(group.numbers, map(SolvedProblem._make, parts), strict=True))
        order_P = torch.cat(students).argsort()
        return self._by_sample(
            solved,
            torch.cat(students)[order_P],
            torch.cat(teachers)[order_P],
            torch.cat(proofs)[order_P] if proofs else None,
        )

    def _by_sample(
        self,
        solved: Mapping[int, SolvedProblem],
        student_P: Tensor,
        teacher_P: Tensor,
        certified_P: Tensor | None,
    ) -> Matching:
        """Cut what was found, in the order of the student's rows, into samples."""
        every, num_student, num_teacher = self.problems
        own: list[list[SolvedProblem]] = [[] for _ in num_student]
        for number, problem in enumerate(every):
            own[problem.sample].append(solved[number])
        num_pairs = [sum(len(each.rows) for each in problems) for problems in own]
        sample_P = torch.arange(len(own)).repeat_interleave(torch.tensor(num_pairs))

        def of_each(rows_P: Tensor, sizes: list[int]) -> Sequence[Tensor]:
            """Rows as the samples count them, each from its own first."""
            first_S = torch.tensor([0, *accumulate(sizes)])
            return (rows_P - first_S[sample_P]).to(self.device).split(num_pairs)

        students, teachers = of_each(student_P, num_student), of_each(teacher_P, num_teacher)
        none = [None] * len(own)
        proofs = none if certified_P is None else certified_P.to(self.device).split(num_pairs)
        samples = [
            Assignment(
                student=students[number],
                teacher=teachers[number],
                num_student=num_student[number],
                num_teacher=num_teacher[number],
                total_cost=sum(problem.total_cost for problem in problems),
                problems=tuple(problems),
                certified=proofs[number],
            )
            for number, problems in enumerate(own)
        ]
        return Matching(samples, teacher_P.to(self.device))


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
    groups: list[_Group] = []
    for numbers in _alike(problems.every, teacher, config):
        alike = [problems.every[number] for number in numbers]
        own = rows_of([span for problem in alike for span in problem.student])
        theirs = rows_of([span for problem in alike for span in problem.teacher])
        costs = pair_costs(
            student_hidden[own],
            logits[own] if isinstance(logits, Tensor) else logits,
            teacher.rows(theirs),
            config,
            len(alike),
        )
        solutions = _start_solving(costs.cost, teacher.rows(theirs), config)
        rows = (_numbered(own).view(len(alike), -1), _numbered(theirs).view(len(alike), -1))
        groups.append(_Group(numbers, *rows, costs, solutions))
    return PendingMatching(device=student_hidden.device, problems=problems, groups=groups)


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


def _start_solving(
    cost: Tensor, teacher: Signal, config: MatchingConfig
) -> list[Future[_Solution]]:
    """Hand problems to the threads: many small ones at a time, large ones each alone."""
    on_host, copied = _to_host(cost)
    errors: Sequence[CostError | None] = [None] * len(cost)
    if config.certify:
        error = cost_error(teacher, config, cost.dtype)
        absolute = error.absolute.view(len(cost), -1)
        errors = [CostError(relative=error.relative, absolute=each) for each in absolute]
    size = max(1, _SOLVED_AT_ONCE // max(1, cost[0].numel()))
    return [
        _solvers().submit(
            _solve, on_host[start : start + size], copied, errors[start:], config.solver
        )
        for start in range(0, len(cost), size)
    ]


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


def _solve(
    cost_Bnm: Tensor,
    copied: torch.cuda.Event | None,
    errors: Sequence[CostError | None],
    solver: MatchSolver,
) -> _Solution:
    if copied is not None:
        copied.synchronize()
    rows, columns = zip(*(solve_assignment(cost, solver) for cost in cost_Bnm), strict=True)
    totals: list[float] = []
    proofs: list[Tensor] = []
    for cost, error, own, theirs in zip(cost_Bnm, errors, rows, columns, strict=False):
        totals.append(float(cost[own, theirs].sum(dtype=torch.float64)))
        if error is not None:
            proofs.append(certified_pairs(cost, error.of(cost), own, theirs))
    certified = torch.stack(proofs) if proofs else None
    return _Solution(torch.stack(rows), torch.stack(columns), totals, certified)
