"""Between which values a divergence lies whose teacher is known at its largest logits only.

A top-k record fixes p on the kept entries, its mass tau outside them, and a cap for every entry
there: none is larger than the smallest kept probability c. Some also know a floor: none is smaller
than m. Over all tails that this allows, for every divergence of the form sum_v q_v f(p_v / q_v)
with f convex,

    least     p_v = min(c, a q_v), with a such that the sum is tau
    largest   all mass where the student has least: entries of c there, m (or 0) elsewhere

The least is above that of one bucket (p_v = a q_v) wherever the student puts more on one entry of
the tail than the teacher can. Entries that are not capped share one ratio, so that they count as
one bucket. Promise: both are valid whenever the record's own numbers are; no gradient; one pass
over the vocabulary. Dimensions as in schema.py.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from student_train.divergence.student_rows import StudentRows, Terms

MOST_CAPPED = 32
"""The caps of so many entries are made use of, those that the student holds likeliest. A bound that
leaves out some caps is a bound still, only lower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """What is known of both sides outside the kept entries."""

    student: StudentRows
    log_p_mass: Float[Tensor, " P"]
    log_cap: Float[Tensor, " P"]
    """No entry of the teacher's is larger."""
    log_floor: Float[Tensor, " P"] | None = None
    """No entry of the teacher's is smaller; None where nothing is known."""


@torch.no_grad()
def least_tail(terms: Terms, tail: Tail) -> Float[Tensor, " P"]:
    """The tail's summands in sum, for the tail of the teacher under which they are least."""
    dtype = tail.student.log_q_mass.dtype
    log_q_mass = tail.student.log_q_mass.double()[:, None]
    log_p_mass = tail.log_p_mass.double()[:, None]
    log_cap = torch.minimum(tail.log_cap.double()[:, None], log_p_mass)
    log_q = tail.student.largest(MOST_CAPPED).double()
    # What is left beside the j largest is found by subtraction: never take it for less than
    # rounding may have made it.
    slack = 8 * torch.finfo(dtype).eps
    share_q = (log_q - log_q_mass).exp().cumsum(dim=1)
    num = torch.arange(1, log_q.shape[1] + 1, device=log_q.device)
    share_p = (log_cap - log_p_mass).exp() * num
    log_q_rest = _with(log_q_mass, log_q_mass + ((1 - share_q).clamp(min=0) + slack).log())
    log_p_rest = _with(log_p_mass, log_p_mass + ((1 - share_p).clamp(min=0) + slack).log())
    # One by one, from the largest: capped, as long as its part of what is left is more than c.
    over = log_q + log_p_rest[:, :-1] - log_q_rest[:, :-1] > log_cap
    num_capped = over.long().cumprod(dim=1).sum(dim=1, keepdim=True)
    capped = terms(log_q, log_cap).masked_fill(num > num_capped, 0.0).sum(dim=1)
    rest = terms(log_q_rest.gather(1, num_capped), log_p_rest.gather(1, num_capped))
    return (capped + rest[:, 0]).to(dtype)


@torch.no_grad()
def largest_reverse_tail(tail: Tail) -> Float[Tensor, " P"]:
    """Every entry at the floor (reverse KL): that is less than tau in all, but hardly matters.

    The entries that would have the rest of it are those where the student has least. Without a
    floor infinity: a teacher may give next to nothing to what the student holds likely.
    """
    if tail.log_floor is None:
        return torch.full_like(tail.log_p_mass, torch.inf)
    mass = tail.student.log_q_mass.exp()
    return torch.where(mass > 0, tail.student.surprise() - mass * tail.log_floor, 0.0)


@torch.no_grad()
def largest_forward_tail(tail: Tail) -> Float[Tensor, " P"]:
    """At most all of tau, in entries of c, where the student holds least likely (forward KL)."""
    log_cap = torch.minimum(tail.log_cap, tail.log_p_mass)
    return tail.log_p_mass.exp() * (log_cap - tail.student.least())


@torch.no_grad()
def largest_jsd_tail(tail: Tail) -> Float[Tensor, " P"]:
    """Both sides' mass on different entries (Jensen-Shannon divergence)."""
    return 0.5 * math.log(2) * (tail.student.log_q_mass.exp() + tail.log_p_mass.exp())


def _with(first: Tensor, others: Tensor) -> Tensor:
    return torch.cat([first, others], dim=1)
