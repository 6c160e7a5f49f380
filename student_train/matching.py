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
or all views of an image together (`scope=global`). Dimensions as in schema.py.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from student_train.cost import cost_matrix
from student_train.objective import MatchingConfig, MatchScope
from student_train.signals import Signal
from teacher_cache.schema import ViewGrid


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Student token `student[i]` is matched to teacher token `teacher[i]`; no token twice.

    `costs` keeps the cost matrix of each problem that was solved, for diagnostics.
    """

    student: Int[Tensor, " P"]
    teacher: Int[Tensor, " P"]
    num_student: int
    num_teacher: int
    total_cost: float
    costs: tuple[Float[Tensor, "_ _"], ...] = field(repr=False)

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


@torch.no_grad()
def match_tokens(
    student_hidden: Float[Tensor, "N D"],
    student_logits: Float[Tensor, "N W"] | None,
    student_views: Sequence[ViewGrid],
    teacher: Signal,
    teacher_views: Sequence[ViewGrid],
    config: MatchingConfig,
) -> Assignment:
    """Pair the N vision tokens of a student with the M of its teacher, for one sample.

    The views say which rows belong together, in row order. ValueError where the two sides do not
    show the same views (or, for scope=global, images), where the record cannot serve the metric,
    and where costs are not finite.
    """
    student_groups = _groups(student_views, config.scope)
    teacher_groups = _groups(teacher_views, config.scope)
    _require_same_groups(student_groups.keys(), teacher_groups.keys(), config.scope)
    device = student_hidden.device
    pairs: list[tuple[int, int]] = []
    total_cost = 0.0
    costs: list[Tensor] = []
    for key, student_rows in student_groups.items():
        student_index = torch.tensor(student_rows, device=device)
        teacher_index = torch.tensor(teacher_groups[key], device=device)
        cost_NM = cost_matrix(
            student_hidden[student_index],
            None if student_logits is None else student_logits[student_index],
            teacher.rows(teacher_index),
            config,
        )
        chosen_student, chosen_teacher = solve_assignment(cost_NM)
        total_cost += float(cost_NM[chosen_student, chosen_teacher].sum(dtype=torch.float64))
        chosen = zip(chosen_student.tolist(), chosen_teacher.tolist(), strict=True)
        pairs += [(student_rows[i], teacher_groups[key][j]) for i, j in chosen]
        costs.append(cost_NM)
    pairs.sort()
    return Assignment(
        student=torch.tensor([i for i, _ in pairs], dtype=torch.int64, device=device),
        teacher=torch.tensor([j for _, j in pairs], dtype=torch.int64, device=device),
        num_student=len(student_hidden),
        num_teacher=teacher.num_rows,
        total_cost=total_cost,
        costs=tuple(costs),
    )


def solve_assignment(
    cost: Float[Tensor, "N M"],
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """The min(N, M) pairs of least total cost, as (row, column) indices sorted by row; on the CPU.

    SciPy's shortest augmenting paths solve the rectangular problem in float64: one or two
    milliseconds at 144 x 729, where the costs themselves take far longer.
    """
    matrix = cost.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(
            f"{int((~torch.isfinite(matrix)).sum())} of {matrix.numel()} matching costs are NaN "
            "or infinite: the student's vision logits have overflowed; lower the learning rate "
            "or train in a wider dtype"
        )
    rows, columns = linear_sum_assignment(matrix.numpy())
    return torch.from_numpy(rows), torch.from_numpy(columns)


def _groups(views: Sequence[ViewGrid], scope: MatchScope) -> dict[tuple[int, ...], list[int]]:
    """Rows of each assignment problem, by (image, view) or by (image,)."""
    groups: dict[tuple[int, ...], list[int]] = {}
    start = 0
    for view in views:
        key = (view.image, view.view) if scope == "view" else (view.image,)
        groups.setdefault(key, []).extend(range(start, start + view.num_tokens))
        start += view.num_tokens
    return groups


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
