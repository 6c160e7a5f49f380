"""Defines the terms that compare logits row by row.

    supervised   cross-entropy with the response token that follows
    rld, vsd     divergence from the teacher's logits at the same row, by default the reverse KL
    kd           always the forward KL (EPIC): from the cache, or from the student itself

A term has a value for each row (`values`) and a linear reduction of these values (`reduce`). So
each row's weight is known before any logit is, and head, loss and gradient can be computed
together. Dimensions as in teacher_output.py.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from student_train.config.objective import DivergenceName, ObjectiveConfig, TailPolicy, UsedTail
from student_train.divergence.divergence import (
    DIVERGENCES,
    Divergence,
    Measure,
    forward_kl,
    reverse_kl,
)
from student_train.divergence.kernel_rows import KernelRows, RowRequest
from student_train.divergence.tail_policies import (
    estimate_weight,
    needs_sketch,
    resolve_tail,
    teacher_log_probs,
)
from student_train.head.chunked_pass import HeadRows, RowLosses
from student_train.head.linear_head import LogitsOf
from student_train.losses.reductions import supervised_rows, token_mean, vsd_loss
from student_train.signals.teacher_signal import DenseSignal, HiddenSignal, Signal, kept_mass
from student_train.signals.top_k import TopKSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitTerm(RowLosses):
    """One term of the objective over a block of rows."""

    name: str
    weight: float
    pairs_per_sample: Sequence[int] | None = None
    """Rows of each sample, whose means are averaged; None averages all rows alike."""
    count: int | None = None
    """What the mean is over in the whole step (step_counts.py); None: over what is here."""
    tail: UsedTail | None = None
    """The tail policy that the teacher really gets (`resolve_tail`); None without a teacher."""

    @abstractmethod
    def chunk(self, rows: slice) -> "LogitTerm":
        """See `RowLosses`, as in the terms below."""

    def reduce(self, values: Float[Tensor, " N"]) -> Float[Tensor, ""]:
        """The term, from its rows' values; linear."""
        if self.pairs_per_sample is None:
            return token_mean(values, self.count)
        return vsd_loss(values, self.pairs_per_sample, values.sum(), self.count)

    def row_weights(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """Each row's weight in the loss: the gradient of the weighted reduction."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.inference_mode(False), torch.enable_grad():
            rows = torch.zeros(len(hidden), dtype=dtype, device=hidden.device, requires_grad=True)
            (weights,) = torch.autograd.grad(self.weight * self.reduce(rows), rows)
        return weights

    def diagnostics(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Numbers for the log, from the values of all rows; none by default."""
        return {}


class KernelTerm(LogitTerm):
    """A term that kernels can compute too, where `has_kernels`."""

    @abstractmethod
    def request(self) -> RowRequest:
        """What kernels have to read."""

    @abstractmethod
    def kernel_values(self, rows: KernelRows, request: RowRequest) -> dict[str, Tensor]:
        """`values` of all rows, from what kernels have read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedTerm(KernelTerm):
    """Cross-entropy over the student's whole vocabulary."""

    name: str = "supervised"
    response_ids: Int[Tensor, " R"]

    @property
    def has_kernels(self) -> bool:
        """Always."""
        return True

    def chunk(self, rows: slice) -> "SupervisedTerm":
        """See `RowLosses`, as below."""
        return replace(self, response_ids=self.response_ids[rows])

    def values(self, logits: Float[Tensor, "n W"], rows: slice) -> dict[str, Tensor]:
        """One cross-entropy for each row."""
        return {self.name: supervised_rows(logits, self.response_ids[rows])}

    def request(self) -> RowRequest:
        """The labels."""
        return RowRequest(labels=self.response_ids)

    def kernel_values(self, rows: KernelRows, request: RowRequest) -> dict[str, Tensor]:
        """One cross-entropy for each row."""
        return {self.name: rows.cross_entropy()}


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceTerm(KernelTerm):
    """A divergence from a teacher whose row i faces the block's row i."""

    teacher: Signal
    measure: Measure
    policy: TailPolicy
    tail: UsedTail = "exact"
    temperature: float
    blend: float

    @property
    def has_kernels(self) -> bool:
        """For a top-k teacher at temperature 1 with a bucket or, in the reverse KL, a blend."""
        teacher = self.teacher
        if not isinstance(teacher, TopKSignal) or teacher.max_kept == teacher.vocab_size:
            return False
        blended = self.tail in ("blend", "blend_template") and self.measure is reverse_kl
        return self.temperature == 1 and (self.tail == "bucket" or blended)

    def chunk(self, rows: slice) -> "DivergenceTerm":
        """Computes the teacher's logits here: heads and sketches are faster for many rows."""
        teacher = _rows(self.teacher, rows)
        if isinstance(teacher, HiddenSignal):
            teacher = DenseSignal(logits=teacher.dense_logits())
        elif isinstance(teacher, TopKSignal) and needs_sketch(self.tail, self.temperature):
            teacher = teacher.decode()
        return replace(self, teacher=teacher)

    def values(self, logits: Float[Tensor, "n W"], rows: slice) -> dict[str, Tensor]:
        """The divergence and, where the teacher is not fully known, its parts and bounds."""
        teacher = _rows(self.teacher, rows)
        return self._named(self.measure(logits, teacher, self.policy, self.temperature, self.blend))

    def request(self) -> RowRequest:
        """The teacher, and its log-probabilities."""
        assert isinstance(self.teacher, TopKSignal)
        estimated = estimate_weight(self.tail, self.blend) > 0
        known = teacher_log_probs(self.teacher, self.tail, 1.0, estimated=estimated)
        return RowRequest(teacher=self.teacher, known=known)

    def kernel_values(self, rows: KernelRows, request: RowRequest) -> dict[str, Tensor]:
        """As `values`."""
        assert request.teacher is not None
        assert request.known is not None
        weight = estimate_weight(self.tail, self.blend)
        return self._named(self.measure.of_rows(rows, request.teacher, request.known, weight))

    def diagnostics(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Means of the parts and bounds, for the log; none where all logits are known.

        The tail policy is logged by name, because values under different policies do not compare.
        If one row has no finite bound, the mean is infinite.
        """
        notes = {name: v for name, v in values.items() if name.startswith(f"{self.name}_")}
        if not notes or not len(values[self.name]):
            return {}
        means = {name: float(note.mean()) for name, note in notes.items()}
        means[f"{self.name}_teacher_kept_mass"] = kept_mass(self.teacher)
        return {**means, f"{self.name}_tail_is_{self.tail}": 1.0}

    def _named(self, found: Divergence) -> dict[str, Tensor]:
        name = self.name
        if self.tail == "exact":
            return {name: found.value}
        values = {
            name: found.value,
            f"{name}_head_part": found.head,
            f"{name}_bucket_part": found.bucket,
            f"{name}_tail_part": found.tail,
            f"{name}_lower_bound": found.lower,
            f"{name}_student_tail_mass": found.student_tail_mass,
        }
        # Caches written before `log_least` existed do not bound a reverse KL from above.
        floor = isinstance(self.teacher, TopKSignal) and self.teacher.record.log_least is not None
        bounded = floor or self.measure is not reverse_kl
        return values | ({f"{name}_upper_bound": found.upper} if bounded else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsistencyTerm(LogitTerm):
    """EPIC's KD: forward KL from the logits that the student's own head gives for other states.

    Over the student's whole vocabulary. The teacher's logits are computed a chunk at a time.
    """

    name: str = "kd"
    tail: UsedTail = "exact"
    hidden: Float[Tensor, "N D"]
    """Without gradient."""
    teacher_logits: LogitsOf
    """The head without gradient."""
    temperature: float

    def chunk(self, rows: slice) -> DivergenceTerm:
        """A divergence from these rows' logits."""
        return DivergenceTerm(
            name=self.name,
            weight=self.weight,
            teacher=DenseSignal(logits=self.teacher_logits(self.hidden[rows])),
            measure=forward_kl,
            policy="exact",
            tail="exact",
            temperature=self.temperature,
            blend=0.0,
        )

    def values(self, logits: Float[Tensor, "n W"], rows: slice) -> dict[str, Tensor]:
        """One divergence for each row."""
        return self.chunk(rows).values(logits, slice(None))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLosses(RowLosses):
    """All terms of a block, which share the logits of a chunk."""

    terms: Sequence[LogitTerm]

    @property
    def has_kernels(self) -> bool:
        """If all terms have them and at most one term has a teacher."""
        served = all(isinstance(term, KernelTerm) and term.has_kernels for term in self.terms)
        return served and sum(term.tail is not None for term in self.terms) <= 1

    def chunk(self, rows: slice) -> "BlockLosses":
        """See `RowLosses`, as below."""
        return BlockLosses(terms=[term.chunk(rows) for term in self.terms])

    def values(self, logits: Float[Tensor, "n W"], rows: slice) -> dict[str, Tensor]:
        """Those of all terms; names do not clash."""
        return {n: v for term in self.terms for n, v in term.values(logits, rows).items()}

    def values_in_place(
        self, logits: Float[Tensor, "n W"], weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """In one pass over the logits, and a second one with weights."""
        terms = [(t, t.request()) for t in self.terms if isinstance(t, KernelTerm)]
        with torch.set_grad_enabled(bool(weights)):
            rows = KernelRows(logits, [request for _, request in terms])
            found = [term.kernel_values(rows, request) for term, request in terms]
        values = {name: value for each in found for name, value in each.items()}
        if weights:
            rows.replace_logits(values, weights)
        return {name: value.detach() for name, value in values.items()}


def divergence_term(
    name: str,
    weight: float,
    teacher: Signal,
    objective: ObjectiveConfig,
    divergence: DivergenceName | None = None,
    *,
    pairs_per_sample: Sequence[int] | None = None,
    count: int | None = None,
) -> DivergenceTerm:
    """A term with the objective's settings and, by default, its divergence.

    ValueError for a tail policy or a temperature that the teacher's record cannot serve.
    """
    return DivergenceTerm(
        name=name,
        weight=weight,
        pairs_per_sample=pairs_per_sample,
        count=count,
        teacher=teacher,
        measure=DIVERGENCES[divergence or objective.divergence],
        policy=objective.tail,
        tail=resolve_tail(objective.tail, teacher, objective.temperature),
        temperature=objective.temperature,
        blend=objective.blend,
    )


def head_rows(hidden: Float[Tensor, "N D"], terms: Sequence[LogitTerm]) -> HeadRows:
    """A block of rows whose terms share the logits of a chunk."""
    weights = {term.name: term.row_weights(hidden) for term in terms}
    return HeadRows(hidden=hidden, losses=BlockLosses(terms=terms), weights=weights)


def _rows(signal: Signal, rows: slice) -> Signal:
    index = torch.arange(signal.num_rows)[rows]
    return signal if len(index) == signal.num_rows else signal.rows(index)
