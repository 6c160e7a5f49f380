"""Lower and upper bounds of a divergence when only the top-k teacher logits are known.

A top-k record fixes p on the kept entries, the mass tau outside them, and a cap of every entry
there: the smallest kept probability c. Some records have a floor m as well. The bounds hold over
all tails that this allows, for every divergence sum_v q_v f(p_v / q_v) with f convex:

    lower     p_v = min(c, a q_v), with a such that the sum is tau
    upper     all mass where the student has least: entries of c there, m (or 0) elsewhere

The lower bound is above that of one bucket (p_v = a q_v) wherever the student puts more on one
entry of the tail than the teacher can. No gradient; one pass over the vocabulary. Dimensions as in
teacher_output.py.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from student_train.divergence.student_rows import StudentRows, Summands

MOST_CAPPED = 32
"""Number of caps in use: those of the tail entries that the student finds likeliest. Leaving out
caps keeps the bound valid, only lower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """What is known of both models outside the kept entries."""

    student: StudentRows
    log_p_mass: Float[Tensor, " P"]
    log_cap: Float[Tensor, " P"]
    """No teacher entry is larger."""
    log_floor: Float[Tensor, " P"] | None = None
    """No teacher entry is smaller; None where unknown."""


@torch.no_grad()
def least_tail(summands: Summands, tail: Tail) -> Float[Tensor, " P"]:
    """Sum of the summands over the tail, for the teacher tail that makes it smallest."""
    dtype = tail.student.log_q_mass.dtype
    log_q_mass = tail.student.log_q_mass.double()[:, None]
    log_p_mass = tail.log_p_mass.double()[:, None]
    log_cap = torch.minimum(tail.log_cap.double()[:, None], log_p_mass)
    log_q = tail.student.tail_largest(MOST_CAPPED).double()
    # The mass beside the j largest comes from a subtraction; the slack covers its rounding.
    slack = 8 * torch.finfo(dtype).eps
    share_q = (log_q - log_q_mass).exp().cumsum(dim=1)
    num = torch.arange(1, log_q.shape[1] + 1, device=log_q.device)
    share_p = (log_cap - log_p_mass).exp() * num
    log_q_rest = _with(log_q_mass, log_q_mass + ((1 - share_q).clamp(min=0) + slack).log())
    log_p_rest = _with(log_p_mass, log_p_mass + ((1 - share_p).clamp(min=0) + slack).log())
    # Entries are capped from the largest on, while an entry's share of the rest exceeds c.
    over = log_q + log_p_rest[:, :-1] - log_q_rest[:, :-1] > log_cap
    num_capped = over.long().cumprod(dim=1).sum(dim=1, keepdim=True)
    capped = summands(log_q, log_cap).masked_fill(num > num_capped, 0.0).sum(dim=1)
    rest = summands(log_q_rest.gather(1, num_capped), log_p_rest.gather(1, num_capped))
    return (capped + rest[:, 0]).to(dtype)


@torch.no_grad()
def largest_reverse_tail(tail: Tail) -> Float[Tensor, " P"]:
    """Reverse KL with every entry at the floor: less than tau in total, which hardly matters.

    The rest of tau would lie where the student has least. Without a floor the bound is infinite: a
    teacher may give almost nothing to what the student finds likely.
    """
    if tail.log_floor is None:
        return torch.full_like(tail.log_p_mass, torch.inf)
    mass = tail.student.log_q_mass.exp()
    return torch.where(mass > 0, tail.student.tail_neg_entropy() - mass * tail.log_floor, 0.0)


@torch.no_grad()
def largest_forward_tail(tail: Tail) -> Float[Tensor, " P"]:
    """Forward KL with all of tau, in entries of c, where the student has least."""
    log_cap = torch.minimum(tail.log_cap, tail.log_p_mass)
    return tail.log_p_mass.exp() * (log_cap - tail.student.min_log_q())


@torch.no_grad()
def largest_jsd_tail(tail: Tail) -> Float[Tensor, " P"]:
    """Jensen-Shannon divergence with the mass of both models on different entries."""
    return 0.5 * math.log(2) * (tail.student.log_q_mass.exp() + tail.log_p_mass.exp())


def _with(first: Tensor, others: Tensor) -> Tensor:
    return torch.cat([first, others], dim=1)
