"""KL divergence between the student and a teacher of whom perhaps only the top-k is known.

    reverse  KL(q || p) = sum_v q_v (log q_v - log p_v)      q student, p teacher (EM-KD)
    forward  KL(p || q) = sum_v p_v (log p_v - log q_v)

Split the vocabulary into a row's kept entries and the tail. The chain rule is exact:

    KL(q || p) = KL(bucketed)  +  q_tail KL(q | tail || p | tail)

The first term merges the tail into one bucket of known mass tau; the second needs a shape of p in
the tail, which a top-k record does not have and a sketch estimates. The policy says what is done:
`bucket` drops the second term, `blend` weighs it, `renormalise` restricts both sides to what is
kept, `exact` refuses to assume anything. Rows of which every logit is known are exact under any
policy, also beside rows of which it is not.

Promise: gradients reach the student's logits and nothing else; sums run in float32 or wider.
Dimensions as in schema.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from student_train.objective import DivergenceName, TailPolicy
from student_train.signals import Signal
from student_train.top_k_signal import TopKSignal, at_least_float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """One KL value per row in nats, times the temperature squared, and what it is made of.

    `value = head + tail`. `lower` and `upper` bound the true divergence from the full teacher
    distribution (not `value`), as far as what is stored allows: 0 and infinity where it tells
    nothing. `student_tail_mass` is the student's probability outside the kept entries.
    """

    value: Float[Tensor, " P"]
    head: Float[Tensor, " P"]
    tail: Float[Tensor, " P"]
    student_tail_mass: Float[Tensor, " P"]
    lower: Float[Tensor, " P"]
    upper: Float[Tensor, " P"]


def resolve_tail(policy: TailPolicy, signal: Signal, temperature: float = 1.0) -> TailPolicy:
    """The policy that is really used on a signal; the one place where a default changes.

    Exact signals are `exact` whatever was asked. `blend` needs a sketch for the tail's shape;
    without one it is `bucket`, because a uniform tail would point the gradient of the reverse KL
    away from the teacher (cosine about -0.9 for a flat student, docs/method.md). ValueError for
    `exact` on a signal that is not, and for a temperature that a lumped tail cannot follow.
    """
    if not isinstance(signal, TopKSignal) or signal.exact:
        return "exact"
    if policy == "exact":
        raise ValueError(
            f"tail=exact, but the cache holds the {signal.least_kept} largest of "
            f"{signal.vocab_size} logits; build it with records `hidden`, or choose the tail "
            "policy blend, bucket or renormalise"
        )
    if policy == "renormalise" or signal.sketch is not None:
        return policy
    if temperature != 1:
        raise ValueError(
            f"at temperature {temperature} the mass of the tail is not the stored one, and a "
            "top-k record without a sketch cannot recompute it; use temperature 1, "
            "tail=renormalise, or records `hidden` (`topk+sketch` sketches vision tokens only)"
        )
    return "bucket"


def reverse_kl(
    student_logits: Float[Tensor, "P W"],
    teacher: Signal,
    policy: TailPolicy = "blend",
    temperature: float = 1.0,
    blend: float = 0.5,
) -> Divergence:
    """KL(student || teacher) of each row; the student's W >= V logits are cut to V rows first.

    Cutting before the softmax lets both sides normalise over the same support.
    ValueError for row counts that differ, fewer student than teacher rows of the vocabulary, a
    policy that the signal cannot serve, or a temperature that a lumped tail cannot follow.
    """
    return _divergence(_reverse_terms, student_logits, teacher, policy, temperature, blend)


def forward_kl(
    student_logits: Float[Tensor, "P W"],
    teacher: Signal,
    policy: TailPolicy = "blend",
    temperature: float = 1.0,
    blend: float = 0.5,
) -> Divergence:
    """KL(teacher || student) of each row; otherwise as `reverse_kl`."""
    return _divergence(_forward_terms, student_logits, teacher, policy, temperature, blend)


Measure = Callable[[Tensor, Signal, TailPolicy, float, float], Divergence]
DIVERGENCES: dict[DivergenceName, Measure] = {"reverse_kl": reverse_kl, "forward_kl": forward_kl}
"""By name: what the terms of an objective may measure."""

Terms = Callable[[Tensor, Tensor], Tensor]
"""From (log q, log p) to the summands of a KL, entry by entry."""


def _reverse_terms(log_q: Tensor, log_p: Tensor) -> Tensor:
    return log_q.exp() * (log_q - log_p)


def _forward_terms(log_q: Tensor, log_p: Tensor) -> Tensor:
    return log_p.exp() * (log_p - log_q)


def _divergence(
    terms: Terms,
    student_logits: Tensor,
    teacher: Signal,
    policy: TailPolicy,
    temperature: float,
    blend: float,
) -> Divergence:
    if len(student_logits) != teacher.num_rows or student_logits.shape[1] < teacher.vocab_size:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} do not face a teacher of "
            f"{teacher.num_rows} rows over {teacher.vocab_size} vocabulary rows"
        )
    cut = at_least_float32(student_logits[:, : teacher.vocab_size])
    resolved = resolve_tail(policy, teacher, temperature)
    if resolved == "exact" or not isinstance(teacher, TopKSignal):
        return _exact(terms, cut, teacher.dense_logits(), temperature)
    if teacher.ids.shape[1] < teacher.vocab_size:
        return _lumped(terms, cut, teacher, resolved, temperature, blend)
    # Rows that keep all V entries stand beside rows that do not; the former have no tail to lump.
    whole = teacher.counts == teacher.vocab_size
    some, others = whole.nonzero()[:, 0], (~whole).nonzero()[:, 0]
    exact = _exact(terms, cut[some], teacher.rows(some).dense_logits(), temperature)
    rest = _lumped(terms, cut[others], teacher.rows(others), resolved, temperature, blend)
    return _interleaved(exact, rest, torch.cat([some, others]).argsort())


def _interleaved(first: Divergence, second: Divergence, order: Tensor) -> Divergence:
    names = [field.name for field in fields(Divergence)]
    parts = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names}
    return Divergence(**{name: values[order] for name, values in parts.items()})


def _exact(terms: Terms, student: Tensor, teacher: Tensor, temperature: float) -> Divergence:
    log_q = functional.log_softmax(student / temperature, dim=1)
    log_p = functional.log_softmax(teacher.to(log_q.dtype) / temperature, dim=1)
    value = terms(log_q, log_p).sum(dim=1) * temperature**2
    zero = torch.zeros_like(value)
    bound = value.detach()
    return Divergence(
        value=value, head=value, tail=zero, student_tail_mass=zero, lower=bound, upper=bound
    )


def _lumped(
    terms: Terms,
    student: Tensor,
    teacher: TopKSignal,
    policy: TailPolicy,
    temperature: float,
    blend: float,
) -> Divergence:
    if policy == "renormalise":
        return _renormalised(terms, student, teacher, temperature)
    return _bucketed(terms, student, teacher, temperature, blend if policy == "blend" else 0.0)


def _renormalised(
    terms: Terms, student: Tensor, teacher: TopKSignal, temperature: float
) -> Divergence:
    """Both sides restricted to kept ids: nothing says anything of student mass outside (biased)."""
    ids_PK = teacher.ids.long()
    log_q = _kept_log_softmax(student.gather(1, ids_PK) / temperature, teacher)
    kept = teacher.logits.detach().to(log_q.dtype)
    log_p = _kept_log_softmax(kept / temperature, teacher)
    value = _kept_sum(terms(log_q, log_p), teacher) * temperature**2
    full_q = functional.log_softmax(student.detach() / temperature, dim=1)
    return Divergence(
        value=value,
        head=value,
        tail=torch.zeros_like(value),
        student_tail_mass=_outside(full_q, ids_PK).exp(),
        lower=torch.zeros_like(value),
        upper=torch.full_like(value, torch.inf),
    )


def _bucketed(
    terms: Terms, student: Tensor, teacher: TopKSignal, temperature: float, blend: float
) -> Divergence:
    """(1 - blend) KL(bucketed) + blend KL with the estimated tail, through the chain rule."""
    ids_PK = teacher.ids.long()
    log_q = functional.log_softmax(student / temperature, dim=1)
    log_q_tail = _outside(log_q, ids_PK)
    log_p_kept, log_p_tail, estimate = _teacher_parts(teacher, temperature, blend)
    log_p_kept, log_p_tail = log_p_kept.to(log_q.dtype), log_p_tail.to(log_q.dtype)
    head = _kept_sum(terms(log_q.gather(1, ids_PK), log_p_kept), teacher)
    bucket = terms(log_q_tail, log_p_tail)
    tail = bucket
    if estimate is not None:
        outside = terms(log_q, estimate.to(log_q.dtype)).scatter(1, ids_PK, 0.0).sum(dim=1)
        tail = bucket + blend * (outside - bucket)
    # Merging outcomes never raises a divergence (data processing inequality), and the bucket's
    # masses are the true ones at temperature 1; at others they are estimates and bound nothing.
    bounded = temperature == 1
    lower = (head + bucket).detach().clamp(min=0) if bounded else torch.zeros_like(head)
    scale = temperature**2
    return Divergence(
        value=(head + tail) * scale,
        head=head * scale,
        tail=tail * scale,
        student_tail_mass=log_q_tail.detach().exp(),
        lower=lower,
        upper=torch.full_like(lower, torch.inf),
    )


@torch.no_grad()
def _teacher_parts(
    teacher: TopKSignal, temperature: float, blend: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log p of the kept entries [P, K], of the whole tail [P], and of everything [P, V] or None."""
    if temperature == 1:
        estimate = teacher.estimated_log_probs() if blend > 0 else None
        return teacher.kept_log_probs(), at_least_float32(teacher.log_tail), estimate
    estimate = functional.log_softmax(teacher.estimated_log_probs() / temperature, dim=1)
    ids_PK = teacher.ids.long()
    return estimate.gather(1, ids_PK), _outside(estimate, ids_PK), estimate if blend > 0 else None


def _kept_log_softmax(entries: Tensor, teacher: TopKSignal) -> Tensor:
    """Log-softmax over each row's kept entries; repetitions get the value of what they repeat."""
    mask = teacher.kept_mask
    if mask is None:
        return functional.log_softmax(entries, dim=1)
    return entries - entries.masked_fill(~mask, -torch.inf).logsumexp(dim=1, keepdim=True)


def _kept_sum(entries: Tensor, teacher: TopKSignal) -> Tensor:
    """Sum over each row's kept entries, every one of them once."""
    mask = teacher.kept_mask
    return (entries if mask is None else entries.masked_fill(~mask, 0.0)).sum(dim=1)


def _outside(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log of the mass outside the kept ids, summed over the tail itself (never 1 - kept)."""
    return log_probs.scatter(1, ids, -torch.inf).logsumexp(dim=1)
