"""Measures matchings: how arbitrary one is, and how far one is from another's costs.

No number here enters a loss or has a gradient. Dimensions as in teacher_output.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from student_train.matching.assignment import Assignment, PairPlaces
from student_train.matching.correspondences.local import local
from student_train.matching.correspondences.pairing import PairingProblem
from student_train.ops.precision import at_least_float32

LEAST_SEPARABILITY = 0.1
"""Below this a matching is nearly arbitrary (measured: docs/method.md)."""


@torch.no_grad()
def separability(cost: Float[Tensor, "*batch N M"]) -> Float[Tensor, "*batch"]:
    """Standard deviation of the interaction over that of the costs; 1 where costs are constant.

    Costs are row + column + interaction, and only the interaction decides the matching. In float64.
    """
    wide = cost.to(torch.float64)
    by_row = wide.mean(dim=-1, keepdim=True)
    interaction = wide - by_row
    by_column = interaction.mean(dim=-2, keepdim=True)
    interaction -= by_column
    # The three terms are orthogonal: their mean squares add up to that of the costs.
    apart = interaction.square_().mean(dim=(-2, -1))
    by_row -= by_row.mean(dim=-2, keepdim=True)
    spread = apart + by_row.square_().mean(dim=(-2, -1)) + by_column.square_().mean(dim=(-2, -1))
    return torch.where(spread > 0, apart / spread, 1.0).sqrt()


@torch.no_grad()
def hubness(cost: Float[Tensor, "*batch N M"]) -> Float[Tensor, "*batch"]:
    """Number of distinct nearest columns over the number of rows; 1 where each row has its own."""
    nearest = cost.argmin(dim=-1)
    is_nearest = torch.zeros_like(cost[..., 0, :]).scatter_(-1, nearest, 1.0)
    return is_nearest.sum(dim=-1, dtype=torch.float64) / cost.shape[-2]


@torch.no_grad()
def pair_places(
    problem: PairingProblem, rows: Int[Tensor, " p"], columns: Int[Tensor, " p"]
) -> PairPlaces | None:
    """What the pairs of one problem say of places; None where it is not known where tokens lie."""
    if problem.geometry is None or not len(rows):
        return None
    own_rows, own_columns = local(problem)
    partner = torch.full((len(problem.cost),), -1)
    partner[own_rows] = own_columns
    return PairPlaces(
        mean_distance=float(problem.geometry.distance[rows, columns].mean()),
        inside=float(problem.geometry.inside[rows, columns].double().mean()),
        local=float((partner[rows] == columns).double().mean()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignmentStats:
    """Means over the problems of some matchings.

    `separability`: near 0 the cost is row + column, every pairing costs the same and the matching
    is arbitrary; raw logits with a large free constant come near 0 (docs/method.md).
    `arbitrary`: share of problems with separability below `LEAST_SEPARABILITY`.
    Both are of the problems with several tokens on both sides; None where there are none.
    `hubness`: distinct nearest teacher tokens per student token.
    `distance`, `inside`, `local`: of pairs, see `PairPlaces`; None for scope=global.
    `certified`: share of pairs that are provably those of the exact costs; None unless
    `MatchingConfig.certify`.
    """

    mean_cost: float
    separability: float | None
    arbitrary: float | None
    hubness: float
    distance: float | None = None
    inside: float | None = None
    local: float | None = None
    certified: float | None = None


def assignment_stats(assignments: Sequence[Assignment]) -> AssignmentStats:
    """Average over every problem of every assignment; all 0 where nothing was matched."""
    problems = [problem for assignment in assignments for problem in assignment.problems]
    num_pairs = sum(assignment.num_pairs for assignment in assignments)
    # With one token on a side there is no interaction, and nothing is arbitrary.
    several = [problem.separability for problem in problems if min(problem.cost.shape) > 1]
    proven = certified_pairs(assignments)
    places = [problem.places for problem in problems if problem.places is not None]
    return AssignmentStats(
        mean_cost=sum(problem.total_cost for problem in problems) / max(1, num_pairs),
        separability=_mean(several) if several else None,
        arbitrary=_mean(float(value < LEAST_SEPARABILITY) for value in several)
        if several
        else None,
        hubness=_mean(problem.hubness for problem in problems),
        distance=_mean(each.mean_distance for each in places) if places else None,
        inside=_mean(each.inside for each in places) if places else None,
        local=_mean(each.local for each in places) if places else None,
        certified=None if proven is None or not num_pairs else float(proven.double().mean()),
    )


def certified_pairs(assignments: Sequence[Assignment]) -> Bool[Tensor, " P"] | None:
    """Return which pairs are proven, problem by problem; None unless `MatchingConfig.certify`."""
    problems = [problem for assignment in assignments for problem in assignment.problems]
    proofs = [problem.certified for problem in problems if problem.certified is not None]
    return torch.cat(proofs) if proofs else None


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchingQuality:
    """A matching judged by more exact costs than those it was computed from.

    `regret`: its excess over the least total cost, as a share of a random matching's excess.
    `agreement`: share of its pairs that the optimal matching has too.
    """

    regret: float
    agreement: float


def matching_quality(chosen: Assignment, exact: Assignment) -> MatchingQuality:
    """Judge `chosen` by the costs of `exact`, the optimal matching of the same tokens."""
    excess = random_excess = 0.0
    num_equal = num_pairs = 0
    for found, best in zip(chosen.problems, exact.problems, strict=True):
        cost = best.cost.to(torch.float64)
        least = float(cost[best.rows, best.columns].sum())
        excess += float(cost[found.rows, found.columns].sum()) - least
        random_excess += float(cost.mean()) * len(best.rows) - least
        chosen_pairs = set(zip(found.rows.tolist(), found.columns.tolist(), strict=True))
        num_equal += len(
            chosen_pairs & set(zip(best.rows.tolist(), best.columns.tolist(), strict=True))
        )
        num_pairs += len(best.rows)
    return MatchingQuality(
        regret=excess / random_excess if random_excess > 0 else 0.0,
        agreement=num_equal / max(1, num_pairs),
    )


@torch.no_grad()
def row_mean_spread(logits: Float[Tensor, "N V"]) -> float:
    """Standard deviation over positions of the mean logit, a constant that softmax ignores."""
    if len(logits) < 2:
        return 0.0
    return float(at_least_float32(logits).mean(dim=1).std())


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / max(1, len(found))
