"""Numbers that tell whether distillation is healthy; none of them enters a loss.

Promise: detached Python floats, computed without gradient (`term_gradient_norms` apart, which
asks autograd and leaves every `.grad` alone). Dimensions as in schema.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from student_train.matching.matching import Assignment
from student_train.matching.separability import LEAST_SEPARABILITY
from student_train.ops.precision import at_least_float32


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignmentStats:
    """What a cost matrix says about the matching drawn from it (means over its problems).

    `separability`: spread of the costs left after row and column means are taken off, over their
    whole spread. Near 0 the cost is row + column, any pairing costs the same and the matching is
    arbitrary; raw logits with a large free constant get there (docs/method.md).
    `arbitrary`: share of the problems whose separability is below `LEAST_SEPARABILITY`, among those
    of several tokens on both sides.
    `hubness`: distinct nearest teacher tokens per student token; 1 where each has its own.
    `certified`: share of the pairs that are provably those of the exact costs; None where that was
    not asked for.
    """

    mean_cost: float
    separability: float
    arbitrary: float
    hubness: float
    certified: float | None = None


def assignment_stats(assignments: Sequence[Assignment]) -> AssignmentStats:
    """Averages over every problem of every assignment; all 0 where nothing was matched."""
    problems = [problem for assignment in assignments for problem in assignment.problems]
    num_pairs = sum(assignment.num_pairs for assignment in assignments)
    # Of one token nothing interacts, and nothing is arbitrary.
    several = [problem.separability for problem in problems if min(problem.cost.shape) > 1]
    proofs = [each.certified for each in assignments if each.certified is not None]
    return AssignmentStats(
        mean_cost=sum(problem.total_cost for problem in problems) / max(1, num_pairs),
        separability=_mean(problem.separability for problem in problems),
        arbitrary=_mean(float(value < LEAST_SEPARABILITY) for value in several),
        hubness=_mean(problem.hubness for problem in problems),
        certified=float(torch.cat(proofs).double().mean()) if proofs and num_pairs else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchingQuality:
    """A matching, judged by other costs than those that it was drawn from.

    `regret`: its excess over the least total cost, as a share of a random matching's excess.
    `agreement`: share of its pairs that the least costly matching has too.
    """

    regret: float
    agreement: float


def matching_quality(chosen: Assignment, exact: Assignment) -> MatchingQuality:
    """Judge `chosen` by the costs of `exact`, a matching of the same tokens."""
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
    """Standard deviation over positions of the mean logit, the constant that softmax ignores."""
    if len(logits) < 2:
        return 0.0
    return float(at_least_float32(logits).mean(dim=1).std())


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / max(1, len(found))
