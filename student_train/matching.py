"""Vision token matching: who among the teacher's vision tokens is each student token's model?

The student has compressed its vision tokens, so positions no longer correspond. EM-KD asks
the two LM heads instead: tokens that *say* similar things over the vocabulary belong together,
and one assignment problem finds the pairing of least total cost,

    sigma = argmin over injective maps of  sum_j C[j, sigma(j)],

with C from `cost.py`. Injectivity is the point: the nearest teacher token of most student tokens
is one of a few hubs (docs/method.md), and only the constraint spreads them out. With N < M every
student token gets its own teacher token and M - N stay unused; with N > M it is the reverse.

Promise: index pairs, optimal up to the solver's float64, sorted by student token; no gradient; no
knowledge of any loss. Views are solved one by one (`scope=view`: both models cut the image alike)
or all views of an image together (`scope=global`). `start_matching` computes costs and returns
while threads solve them, so that other work hides the solving; bits do not depend on that.
Dimensions as in schema.py.
"""

import os
from collections.abc import Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from student_train.assignment import solve_assignment
from student_train.certificate import certified_pairs
from student_train.cost import CostError, Costs, cost_error, pair_costs
from student_train.linear_head import LogitsOf
from student_train.objective import MatchingConfig, MatchScope, MatchSolver
from student_train.signals import Signal
from teacher_cache.schema import ViewGrid


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Student token `student[i]` is matched to teacher token `teacher[i]`; no token twice.

    For diagnostics, `costs` keeps the cost matrix of each problem that was solved and `mean_logits`
    (empty where states were compared) what `Costs` says of its student tokens. `certified` says
    which pairs are provably those of the exact costs, where `MatchingConfig.certify` asked for it.
    """

    student: Int[Tensor, " P"]
    teacher: Int[Tensor, " P"]
    num_student: int
    num_teacher: int
    total_cost: float
    costs: tuple[Float[Tensor, "_ _"], ...] = field(repr=False)
    mean_logits: tuple[Float[Tensor, " _"], ...] = field(default=(), repr=False)
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


class _Pairs(NamedTuple):
    """The solution of one problem, in its own rows and columns; all on the CPU."""

    rows: Tensor
    columns: Tensor
    cost: float
    certified: Tensor | None


class _Problem(NamedTuple):
    student_rows: Tensor
    teacher_rows: Tensor
    costs: Costs
    pairs: Future[_Pairs]


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingMatching:
    """A matching that is being solved; `result` waits for it."""

    num_student: int
    num_teacher: int
    device: torch.device
    problems: tuple[_Problem, ...] = field(repr=False)

    def result(self) -> Assignment:
        """The matching; ValueError where costs are not finite. May be asked more than once."""
        solved = [(problem, problem.pairs.result()) for problem in self.problems]
        none = torch.empty(0, dtype=torch.int64)
        student_P = torch.cat([none, *(each.student_rows[found.rows] for each, found in solved)])
        teacher_P = torch.cat([none, *(each.teacher_rows[found.columns] for each, found in solved)])
        order_P = student_P.argsort()
        proofs = [found.certified for _, found in solved if found.certified is not None]
        means = [problem.costs.mean_logits for problem in self.problems]
        return Assignment(
            student=student_P[order_P].to(self.device),
            teacher=teacher_P[order_P].to(self.device),
            num_student=self.num_student,
            num_teacher=self.num_teacher,
            total_cost=sum(found.cost for _, found in solved),
            costs=tuple(problem.costs.cost for problem in self.problems),
            mean_logits=tuple(mean for mean in means if mean is not None),
            certified=torch.cat(proofs)[order_P].to(self.device) if proofs else None,
        )


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
    the student's views its rows are, where it has dropped others. ValueError where the two sides do
    not show the same views (or, for scope=global, images), where the record cannot serve the
    metric, and where costs are not finite.
    """
    return start_matching(
        student_hidden, student_logits, student_views, teacher, teacher_views, config, student_kept
    ).result()


@torch.no_grad()
def start_matching(
    student_hidden: Float[Tensor, "N D"],
    student_logits: Float[Tensor, "N W"] | LogitsOf | None,
    student_views: Sequence[ViewGrid],
    teacher: Signal,
    teacher_views: Sequence[ViewGrid],
    config: MatchingConfig,
    student_kept: Int[Tensor, " N"] | None = None,
) -> PendingMatching:
    """Compute the costs, and let threads solve the assignments while the caller goes on.

    As `match_tokens`, whose result is that of the matching returned, to the bit; a ValueError over
    costs that are not finite comes with the result. Each cost leaves its device once, without
    waiting for it; what was passed in may be freed or changed at once.
    """
    student_groups = _groups(student_views, config.scope)
    teacher_groups = _groups(teacher_views, config.scope)
    _require_same_groups(student_groups.keys(), teacher_groups.keys(), config.scope)
    if student_kept is not None:
        student_groups = _only_kept(student_groups, student_kept)
    device = student_hidden.device
    problems: list[_Problem] = []
    for key, student_rows in student_groups.items():
        teacher_rows = teacher_groups[key]
        signal, logits = teacher, student_logits
        if teacher_rows != list(range(teacher.num_rows)):
            signal = teacher.rows(torch.tensor(teacher_rows, device=device))
        if isinstance(logits, Tensor):
            logits = _rows_of(logits, student_rows)
        costs = pair_costs(_rows_of(student_hidden, student_rows), logits, signal, config)
        on_host, copied = _to_host(costs.cost)
        error = cost_error(signal, config, costs.cost.dtype) if config.certify else None
        pairs = _solvers().submit(_solve, on_host, copied, error, config.solver)
        rows = torch.tensor(student_rows), torch.tensor(teacher_rows)
        problems.append(_Problem(*rows, costs, pairs))
    return PendingMatching(
        num_student=len(student_hidden),
        num_teacher=teacher.num_rows,
        device=device,
        problems=tuple(problems),
    )


def _rows_of(values: Tensor, rows: list[int]) -> Tensor:
    """Some rows, copied only where these are not all in order."""
    if rows == list(range(len(values))):
        return values
    return values[torch.tensor(rows, device=values.device)]


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
    cost: Tensor, copied: torch.cuda.Event | None, error: CostError | None, solver: MatchSolver
) -> _Pairs:
    if copied is not None:
        copied.synchronize()
    rows, columns = solve_assignment(cost, solver)
    total = float(cost[rows, columns].sum(dtype=torch.float64))
    if error is None:
        return _Pairs(rows, columns, total, None)
    return _Pairs(rows, columns, total, certified_pairs(cost, error.of(cost), rows, columns))


def _groups(views: Sequence[ViewGrid], scope: MatchScope) -> dict[tuple[int, ...], list[int]]:
    """Rows of each assignment problem, by (image, view) or by (image,)."""
    groups: dict[tuple[int, ...], list[int]] = {}
    start = 0
    for view in views:
        key = (view.image, view.view) if scope == "view" else (view.image,)
        groups.setdefault(key, []).extend(range(start, start + view.num_tokens))
        start += view.num_tokens
    return groups


def _only_kept(
    groups: dict[tuple[int, ...], list[int]], kept: Tensor
) -> dict[tuple[int, ...], list[int]]:
    """The groups as rows of the kept tokens; a group of which none is left poses no problem."""
    row_of = {token: row for row, token in enumerate(kept.tolist())}
    left = {key: [row_of[t] for t in tokens if t in row_of] for key, tokens in groups.items()}
    return {key: rows for key, rows in left.items() if rows}


def _require_same_groups(
    student: Set[tuple[int, ...]], teacher: Set[tuple[int, ...]], scope: MatchScope
) -> None:
    if student == teacher:
        return
    only_student, only_teacher = sorted(student - teacher), sorted(teacher - student)
    if scope == "view":
        raise ValueError(
            "matching view by view needs the same views on both sides, as (image, view): only the "
            f"student has {only_student}, only the teacher {only_teacher}; use scope=global"
        )
    raise ValueError(
        f"the student and the teacher saw different images: only the student has {only_student}, "
        f"only the teacher {only_teacher}; the cache belongs to other samples"
    )
