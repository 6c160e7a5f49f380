"""Divergence between the student and a teacher whose logits may be known only at its top k.

    reverse  KL(q || p) = sum_v q_v (log q_v - log p_v)      q student, p teacher (EM-KD)
    forward  KL(p || q) = sum_v p_v (log p_v - log q_v)      (EPIC)
    jsd      (KL(q || m) + KL(p || m)) / 2,  m = (q + p) / 2

The vocabulary splits into a row's kept entries and the tail. The chain rule is exact:

    KL(q || p) = KL(bucketed)  +  q_tail KL(q | tail || p | tail)        (the others alike)

The first summand merges the tail into one bucket of known mass tau. The second needs the shape of p
in the tail, which a sketch or a template estimates (tail_policies.py). Rows of which every logit is
known are exact under any policy. Promise: gradients reach the student's logits alone; sums run in
float32 or wider. Dimensions as in teacher_output.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from student_train.config.objective import DivergenceName, TailPolicy, UsedTail
from student_train.divergence.student_rows import DenseRows, StudentRows, Summands
from student_train.divergence.tail_bounds import (
    Tail,
    largest_forward_tail,
    largest_jsd_tail,
    largest_reverse_tail,
    least_tail,
)
from student_train.divergence.tail_policies import (
    TeacherLogProbs,
    estimate_weight,
    resolve_tail,
    teacher_log_probs,
)
from student_train.ops.precision import at_least_float32
from student_train.signals.teacher_signal import Signal
from student_train.signals.top_k import TopKSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """One value per row in nats, times the squared temperature, and its parts.

    `value = head + bucket + tail`: the kept entries, all others as one outcome, and what the policy
    adds for the estimated shape of the tail (0 under `bucket`). `lower` and `upper` bound the
    divergence from the full teacher distribution (not `value`), whatever the policy
    (tail_bounds.py). Where the record allows no bound, as at temperatures other than 1, they are 0
    and infinity (ln 2 for the JSD). The reverse KL has a finite `upper` only where the record has
    `log_least` or every logit. `student_tail_mass` is the student's probability outside the kept
    entries.
    """

    value: Float[Tensor, " P"]
    head: Float[Tensor, " P"]
    bucket: Float[Tensor, " P"]
    tail: Float[Tensor, " P"]
    student_tail_mass: Float[Tensor, " P"]
    lower: Float[Tensor, " P"]
    upper: Float[Tensor, " P"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A divergence, as a sum over vocabulary entries of a function of (log q, log p)."""

    summands: Summands
    largest_tail: Callable[[Tail], Tensor]
    """Upper bound [P] of the sum over the tail."""
    most: float = math.inf
    """No value is larger."""

    def __call__(
        self,
        student_logits: Float[Tensor, "P W"],
        teacher: Signal,
        policy: TailPolicy = "blend",
        temperature: float = 1.0,
        blend: float = 0.5,
    ) -> Divergence:
        """The divergence of each row; the student's W >= V logits are cut to V rows first.

        Cutting before the softmax lets both sides normalise over the same support.
        ValueError for row counts that differ, a student with fewer vocabulary rows than the
        teacher, a policy that the signal cannot serve, or a temperature at which the mass of the
        tail is not known.
        """
        if len(student_logits) != teacher.num_rows or student_logits.shape[1] < teacher.vocab_size:
            raise ValueError(
                f"student logits {tuple(student_logits.shape)} do not match a teacher of "
                f"{teacher.num_rows} rows over {teacher.vocab_size} vocabulary rows; pass one row "
                "for each of the teacher's, over at least its vocabulary"
            )
        cut = at_least_float32(student_logits[:, : teacher.vocab_size])
        tail = resolve_tail(policy, teacher, temperature)
        if tail == "exact" or not isinstance(teacher, TopKSignal):
            return self._exact(cut, teacher.dense_logits(), temperature)
        if teacher.max_kept < teacher.vocab_size:
            return self._with_tail(cut, teacher, tail, temperature, blend)
        # Some rows keep all V entries and have no tail.
        whole = teacher.counts == teacher.vocab_size
        some, others = whole.nonzero()[:, 0], (~whole).nonzero()[:, 0]
        exact = self._exact(cut[some], teacher.rows(some).dense_logits(), temperature)
        rest = self._with_tail(cut[others], teacher.rows(others), tail, temperature, blend)
        return _interleaved(exact, rest, torch.cat([some, others]).argsort())

    def of_rows(
        self, rows: StudentRows, teacher: TopKSignal, known: TeacherLogProbs, weight: float
    ) -> Divergence:
        """The divergence at temperature 1 of rows that all have a tail.

        `weight` is that of the estimated tail in `known` (`estimate_weight`).
        """
        return self._with_bounds(rows, teacher, self._bucketed(rows, teacher, known, weight), 1.0)

    def _exact(self, student: Tensor, teacher: Tensor, temperature: float) -> Divergence:
        log_q = functional.log_softmax(student / temperature, dim=1)
        log_p = functional.log_softmax(teacher.to(log_q.dtype) / temperature, dim=1)
        value = self.summands(log_q, log_p).sum(dim=1) * temperature**2
        zero, bound = torch.zeros_like(value), value.detach()
        return Divergence(
            value=value,
            head=value,
            bucket=zero,
            tail=zero,
            student_tail_mass=zero,
            lower=bound,
            upper=bound,
        )

    def _with_tail(
        self, student: Tensor, teacher: TopKSignal, tail: UsedTail, temperature: float, blend: float
    ) -> Divergence:
        if tail == "renormalise":
            with torch.no_grad():  # only bounds and the student's mass need them
                rows = DenseRows(student / temperature, teacher.record.ids)
            head = self._renormalised(student, teacher, temperature)
            nothing = torch.zeros_like(head)
            return self._with_bounds(rows, teacher, (head, nothing, nothing), temperature)
        rows = DenseRows(student / temperature, teacher.record.ids)
        weight = estimate_weight(tail, blend)
        known = teacher_log_probs(teacher, tail, temperature, estimated=weight > 0)
        sums = self._bucketed(rows, teacher, known, weight)
        return self._with_bounds(rows, teacher, sums, temperature)

    def _renormalised(self, student: Tensor, teacher: TopKSignal, temperature: float) -> Tensor:
        """Both sides restricted to kept ids. Biased: student mass outside costs nothing."""
        kept = student.gather(1, teacher.record.ids.long())
        log_q = _kept_log_softmax(kept / temperature, teacher)
        logits = teacher.record.logits.detach().to(log_q.dtype)
        log_p = _kept_log_softmax(logits / temperature, teacher)
        return _kept_sum(self.summands(log_q, log_p), teacher)

    def _bucketed(
        self, rows: StudentRows, teacher: TopKSignal, known: TeacherLogProbs, weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum over kept entries, the bucket, and the weighted step to the estimated tail's sum."""
        log_q_kept, log_q_mass = rows.log_q_kept, rows.log_q_mass
        head = _kept_sum(self.summands(log_q_kept, known.kept.to(log_q_kept.dtype)), teacher)
        bucket = self.summands(log_q_mass, known.tail_mass.to(log_q_mass.dtype))
        if known.tail_entries is None:
            return head, bucket, torch.zeros_like(bucket)
        entries = rows.tail_sum(self.summands, known.tail_entries.to(log_q_mass.dtype))
        return head, bucket, weight * (entries - bucket)

    def _with_bounds(
        self,
        rows: StudentRows,
        teacher: TopKSignal,
        sums: tuple[Tensor, Tensor, Tensor],
        temperature: float,
    ) -> Divergence:
        """Value and bounds of rows that have a tail; the bounds do not depend on the policy."""
        scale = temperature**2
        head, bucket, tail = (part * scale for part in sums)
        mass = rows.log_q_mass.detach().exp()
        lower, upper = torch.zeros_like(mass), torch.full_like(mass, self.most * scale)
        if temperature == 1:  # at others tau and the kept entries' shares are estimates
            lower, upper = self._bounds(rows, teacher)
        return Divergence(
            value=head + (bucket + tail),
            head=head,
            bucket=bucket,
            tail=tail,
            student_tail_mass=mass,
            lower=lower.detach(),
            upper=upper.detach(),
        )

    @torch.no_grad()
    def _bounds(self, rows: StudentRows, teacher: TopKSignal) -> tuple[Tensor, Tensor]:
        """Of the true divergence at temperature 1, from the kept entries, tau and the smallest.

        Merging outcomes never raises a divergence (data processing inequality), and no entry of the
        tail is larger than any that was kept.
        """
        dtype = rows.log_q_mass.dtype
        log_p_kept = teacher.kept_log_probs().to(dtype)
        head = _kept_sum(self.summands(rows.log_q_kept, log_p_kept), teacher)
        log_floor = teacher.record.log_least
        tail = Tail(
            student=rows,
            log_p_mass=at_least_float32(teacher.record.log_tail).to(dtype),
            log_cap=log_p_kept.amin(dim=1),
            log_floor=None if log_floor is None else log_floor.to(dtype),
        )
        lower = (head + least_tail(self.summands, tail)).clamp(min=0)
        return lower, (head + self.largest_tail(tail)).clamp(max=self.most)


def _reverse_summands(log_q: Tensor, log_p: Tensor) -> Tensor:
    return log_q.exp() * (log_q - log_p)


def _forward_summands(log_q: Tensor, log_p: Tensor) -> Tensor:
    return log_p.exp() * (log_p - log_q)


def _jsd_summands(log_q: Tensor, log_p: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return 0.5 * (log_q.exp() * (log_q - log_m) + log_p.exp() * (log_p - log_m))


reverse_kl = Measure(summands=_reverse_summands, largest_tail=largest_reverse_tail)
forward_kl = Measure(summands=_forward_summands, largest_tail=largest_forward_tail)
jensen_shannon = Measure(summands=_jsd_summands, largest_tail=largest_jsd_tail, most=math.log(2))
DIVERGENCES: dict[DivergenceName, Measure] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jensen_shannon,
}
"""By the name in an objective's settings."""


def _interleaved(first: Divergence, second: Divergence, order: Tensor) -> Divergence:
    names = [field.name for field in fields(Divergence)]
    parts = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names}
    return Divergence(**{name: values[order] for name, values in parts.items()})


def _kept_log_softmax(entries: Tensor, teacher: TopKSignal) -> Tensor:
    """Log-softmax over each row's kept entries; padding gets the value of the first entry."""
    mask = teacher.kept_mask
    if mask is None:
        return functional.log_softmax(entries, dim=1)
    return entries - entries.masked_fill(~mask, -torch.inf).logsumexp(dim=1, keepdim=True)


def _kept_sum(entries: Tensor, teacher: TopKSignal) -> Tensor:
    """Sum over each row's kept entries, each counted once."""
    mask = teacher.kept_mask
    return (entries if mask is None else entries.masked_fill(~mask, 0.0)).sum(dim=1)
