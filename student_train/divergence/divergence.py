"""Divergence between the student and a teacher of whom perhaps only the top-k is known.

    reverse  KL(q || p) = sum_v q_v (log q_v - log p_v)      q student, p teacher (EM-KD)
    forward  KL(p || q) = sum_v p_v (log p_v - log q_v)
    jsd      (KL(q || m) + KL(p || m)) / 2,  m = (q + p) / 2

Split the vocabulary into a row's kept entries and the tail. The chain rule is exact:

    KL(q || p) = KL(bucketed)  +  q_tail KL(q | tail || p | tail)        (the others alike)

The first term merges the tail into one bucket of known mass tau; the second needs a shape of p in
the tail, which a top-k record does not have and a sketch or a template estimates
(tail_policies.py). Rows of which every logit is known are exact under any policy, also beside rows
of which it is not.

Promise: gradients reach the student's logits and nothing else; sums run in float32 or wider.
Dimensions as in schema.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from student_train.config.objective import DivergenceName, TailPolicy, UsedTail
from student_train.divergence.student_rows import DenseRows, StudentRows, Terms
from student_train.divergence.tail_bounds import (
    Tail,
    largest_forward_tail,
    largest_jsd_tail,
    largest_reverse_tail,
    least_tail,
)
from student_train.divergence.tail_policies import TeacherParts, resolve_tail, teacher_parts
from student_train.ops.precision import at_least_float32
from student_train.signals.teacher_signal import Signal
from student_train.signals.top_k import TopKSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """One value per row in nats, times the temperature squared, and what it is made of.

    `value = head + bucket + tail`: the kept entries, all others as one outcome, and what the policy
    adds to that for a tail whose shape it estimates (0 under `bucket`). `lower` and `upper` bound
    the true divergence from the full teacher distribution (not `value`), whatever the policy:
    tail_bounds.py. Where the record tells nothing, as of its tail at temperatures other than 1,
    they are 0 and infinity (ln 2 for the JSD); the reverse KL has a finite `upper` only where the
    record has `log_least`, or every logit is known.
    `student_tail_mass` is the student's probability outside the kept entries.
    """

    value: Float[Tensor, " P"]
    head: Float[Tensor, " P"]
    bucket: Float[Tensor, " P"]
    tail: Float[Tensor, " P"]
    student_tail_mass: Float[Tensor, " P"]
    lower: Float[Tensor, " P"]
    upper: Float[Tensor, " P"]


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
    return _divergence(_REVERSE, student_logits, teacher, policy, temperature, blend)


def forward_kl(
    student_logits: Float[Tensor, "P W"],
    teacher: Signal,
    policy: TailPolicy = "blend",
    temperature: float = 1.0,
    blend: float = 0.5,
) -> Divergence:
    """KL(teacher || student) of each row; otherwise as `reverse_kl`."""
    return _divergence(_FORWARD, student_logits, teacher, policy, temperature, blend)


def jensen_shannon(
    student_logits: Float[Tensor, "P W"],
    teacher: Signal,
    policy: TailPolicy = "blend",
    temperature: float = 1.0,
    blend: float = 0.5,
) -> Divergence:
    """Jensen-Shannon divergence of each row, at most ln 2; otherwise as `reverse_kl`."""
    return _divergence(_JSD, student_logits, teacher, policy, temperature, blend)


Measure = Callable[[Tensor, Signal, TailPolicy, float, float], Divergence]
DIVERGENCES: dict[DivergenceName, Measure] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jensen_shannon,
}
"""By name: what the terms of an objective may measure."""


def _reverse_terms(log_q: Tensor, log_p: Tensor) -> Tensor:
    return log_q.exp() * (log_q - log_p)


def _forward_terms(log_q: Tensor, log_p: Tensor) -> Tensor:
    return log_p.exp() * (log_p - log_q)


def _jsd_terms(log_q: Tensor, log_p: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return 0.5 * (log_q.exp() * (log_q - log_m) + log_p.exp() * (log_p - log_m))


class _Kind(NamedTuple):
    terms: Terms
    largest_tail: Callable[[Tail], Tensor]
    most: float
    """No value is larger."""


_REVERSE = _Kind(_reverse_terms, largest_reverse_tail, math.inf)
_FORWARD = _Kind(_forward_terms, largest_forward_tail, math.inf)
_JSD = _Kind(_jsd_terms, largest_jsd_tail, math.log(2))
_KINDS: dict[DivergenceName, _Kind] = {"reverse_kl": _REVERSE, "forward_kl": _FORWARD, "jsd": _JSD}


def _divergence(
    kind: _Kind,
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
        return _exact(kind, cut, teacher.dense_logits(), temperature)
    if teacher.ids.shape[1] < teacher.vocab_size:
        return _lumped(kind, cut, teacher, resolved, temperature, blend)
    # Rows that keep all V entries stand beside rows that do not; the former have no tail to lump.
    whole = teacher.counts == teacher.vocab_size
    some, others = whole.nonzero()[:, 0], (~whole).nonzero()[:, 0]
    exact = _exact(kind, cut[some], teacher.rows(some).dense_logits(), temperature)
    rest = _lumped(kind, cut[others], teacher.rows(others), resolved, temperature, blend)
    return _interleaved(exact, rest, torch.cat([some, others]).argsort())


def _interleaved(first: Divergence, second: Divergence, order: Tensor) -> Divergence:
    names = [field.name for field in fields(Divergence)]
    parts = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names}
    return Divergence(**{name: values[order] for name, values in parts.items()})


def _exact(kind: _Kind, student: Tensor, teacher: Tensor, temperature: float) -> Divergence:
    log_q = functional.log_softmax(student / temperature, dim=1)
    log_p = functional.log_softmax(teacher.to(log_q.dtype) / temperature, dim=1)
    value = kind.terms(log_q, log_p).sum(dim=1) * temperature**2
    zero = torch.zeros_like(value)
    bound = value.detach()
    return Divergence(
        value=value,
        head=value,
        bucket=zero,
        tail=zero,
        student_tail_mass=zero,
        lower=bound,
        upper=bound,
    )


def _lumped(
    kind: _Kind,
    student: Tensor,
    teacher: TopKSignal,
    policy: UsedTail,
    temperature: float,
    blend: float,
) -> Divergence:
    renormalise = policy == "renormalise"
    with torch.set_grad_enabled(torch.is_grad_enabled() and not renormalise):
        rows = DenseRows(student / temperature, teacher.ids)
    if renormalise:
        head = _renormalised(kind.terms, student, teacher, temperature)
        nothing = torch.zeros_like(head)
        return _with_bounds(kind, rows, teacher, (head, nothing, nothing), temperature)
    weight = estimate_weight(policy, blend)
    parts = teacher_parts(teacher, policy, temperature, weight > 0)
    values = _bucketed(kind.terms, rows, teacher, parts, weight)
    return _with_bounds(kind, rows, teacher, values, temperature)


def lumped(
    name: DivergenceName,
    rows: StudentRows,
    teacher: TopKSignal,
    parts: TeacherParts,
    weight: float,
) -> Divergence:
    """A divergence at temperature 1 where the student's rows are read already.

    Every row has a tail. `parts` are what `teacher_parts` knows of the teacher, and `weight` how
    much its estimate of the tail counts (`estimate_weight`).
    """
    kind = _KINDS[name]
    values = _bucketed(kind.terms, rows, teacher, parts, weight)
    return _with_bounds(kind, rows, teacher, values, 1.0)


def estimate_weight(policy: UsedTail, blend: float) -> float:
    """Of an estimated tail, beside a bucket of the same mass; 0 where none is looked at."""
    return {"bucket": 0.0, "blend": blend, "blend_template": blend}.get(policy, 1.0)


def _with_bounds(
    kind: _Kind,
    rows: StudentRows,
    teacher: TopKSignal,
    parts: tuple[Tensor, Tensor, Tensor],
    temperature: float,
) -> Divergence:
    """Value and bounds of rows that have a tail; the bounds do not depend on the policy."""
    scale = temperature**2
    head, bucket, tail = (part * scale for part in parts)
    mass = rows.log_q_mass.detach().exp()
    lower, upper = torch.zeros_like(mass), torch.full_like(mass, kind.most * scale)
    if temperature == 1:  # at others tau and the kept entries' shares are estimates
        lower, upper = _bounds(kind, rows, teacher)
    return Divergence(
        value=head + (bucket + tail),
        head=head,
        bucket=bucket,
        tail=tail,
        student_tail_mass=mass,
        lower=lower.detach(),
        upper=upper.detach(),
    )


def _renormalised(terms: Terms, student: Tensor, teacher: TopKSignal, temperature: float) -> Tensor:
    """Both sides restricted to kept ids: nothing says anything of student mass outside (biased)."""
    log_q = _kept_log_softmax(student.gather(1, teacher.ids.long()) / temperature, teacher)
    kept = teacher.logits.detach().to(log_q.dtype)
    log_p = _kept_log_softmax(kept / temperature, teacher)
    return _kept_sum(terms(log_q, log_p), teacher)


def _bucketed(
    terms: Terms, rows: StudentRows, teacher: TopKSignal, parts: TeacherParts, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept entries' part, the bucket's, and how far that moves to an estimate's chain rule."""
    log_p_kept, log_p_tail, estimate = parts
    log_q_kept, log_q_mass = rows.log_q_kept, rows.log_q_mass
    head = _kept_sum(terms(log_q_kept, log_p_kept.to(log_q_kept.dtype)), teacher)
    bucket = terms(log_q_mass, log_p_tail.to(log_q_mass.dtype))
    if estimate is None:
        return head, bucket, torch.zeros_like(bucket)
    outside = rows.outside(terms, estimate.to(log_q_mass.dtype))
    return head, bucket, weight * (outside - bucket)


@torch.no_grad()
def _bounds(kind: _Kind, rows: StudentRows, teacher: TopKSignal) -> tuple[Tensor, Tensor]:
    """Of the true divergence at temperature 1, from the kept entries, tau and the least of these.

    Merging outcomes never raises a divergence (data processing inequality), and no entry of the
    tail is larger than any that was kept.
    """
    dtype = rows.log_q_mass.dtype
    log_p_kept = teacher.kept_log_probs().to(dtype)
    head = _kept_sum(kind.terms(rows.log_q_kept, log_p_kept), teacher)
    tail = Tail(
        student=rows,
        log_p_mass=at_least_float32(teacher.log_tail).to(dtype),
        log_cap=log_p_kept.amin(dim=1),
        log_floor=None if teacher.log_least is None else teacher.log_least.to(dtype),
    )
    lower = (head + least_tail(kind.terms, tail)).clamp(min=0)
    return lower, (head + kind.largest_tail(tail)).clamp(max=kind.most)


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
