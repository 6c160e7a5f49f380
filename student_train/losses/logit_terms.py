"""The terms that compare logits, row by row, in the form that `fused_head` wants them.

    supervised   cross-entropy with the response token that follows
    rld, vsd     divergence from what the teacher says at the same row, by default the reverse KL
    kd           the same, always the forward KL (EPIC): from the cache, or from the student itself

A term is what each row gets (`rows`) and a linear reduction of these values, a mean of some kind.
So the weight of every row is known before any logit is, which is what lets head, loss and gradient
be computed together. Beside its value a divergence tells what the value rests on, row by row,
where the teacher is not wholly known. Dimensions as in schema.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from student_train.config.objective import DivergenceName, ObjectiveConfig, UsedTail
from student_train.divergence.divergence import (
    DIVERGENCES,
    Divergence,
    estimate_weight,
    forward_kl,
    lumped,
)
from student_train.divergence.kernel_rows import Reading, losses_in_place
from student_train.divergence.tail_policies import needs_sketch, resolve_tail, teacher_parts
from student_train.head.chunked_pass import HeadRows, InPlaceLosses, RowLosses
from student_train.head.linear_head import LogitsOf, without_gradient
from student_train.losses.reductions import supervised_rows
from student_train.signals.teacher_signal import DenseSignal, HiddenSignal, Signal, kept_mass
from student_train.signals.top_k import TopKSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitTerm:
    """One term of the objective over a block of rows."""

    name: str
    weight: float
    rows: Callable[[slice], RowLosses]
    reduce: Callable[[Float[Tensor, " N"]], Float[Tensor, ""]]
    """From the rows' values to the term; linear."""
    tail: UsedTail | None = None
    """The policy that is really used on the teacher; None without one."""
    kept_mass: float = 1.0
    reading: Callable[[slice], Reading] | None = None
    """The same for kernels; None where there are none for it."""

    def row_weights(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """What each row's value weighs in the loss: the gradient of the weighted reduction."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.inference_mode(False), torch.enable_grad():
            rows = torch.zeros(len(hidden), dtype=dtype, device=hidden.device, requires_grad=True)
            (weights,) = torch.autograd.grad(self.weight * self.reduce(rows), rows)
        return weights

    def diagnostics(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """What the term's value rests on, for the log; nothing where all logits are known.

        The tail policy is there by name, for values under two of them do not compare. A mean over
        rows of which one has no finite bound is infinite.
        """
        notes = {name: v for name, v in values.items() if name.startswith(f"{self.name}_")}
        if not notes or not len(values[self.name]):
            return {}
        means = {name: float(note.mean()) for name, note in notes.items()}
        means[f"{self.name}_teacher_kept_mass"] = self.kept_mass
        return {**means, f"{self.name}_tail_is_{self.tail}": 1.0}


def supervised_term(
    weight: float,
    response_ids: Int[Tensor, " R"],
    reduce: Callable[[Float[Tensor, " R"]], Float[Tensor, ""]],
) -> LogitTerm:
    """Cross-entropy over the student's whole vocabulary."""

    def rows(chunk: slice) -> RowLosses:
        labels = response_ids[chunk]
        return lambda logits, part: {"supervised": supervised_rows(logits, labels[part])}

    def reading(chunk: slice) -> Reading:
        return Reading(
            labels=response_ids[chunk], values=lambda rows: {"supervised": rows.cross_entropy()}
        )

    return LogitTerm(name="supervised", weight=weight, rows=rows, reduce=reduce, reading=reading)


def divergence_term(
    name: str,
    weight: float,
    teacher: Signal,
    objective: ObjectiveConfig,
    reduce: Callable[[Float[Tensor, " N"]], Float[Tensor, ""]],
    divergence: DivergenceName | None = None,
) -> LogitTerm:
    """A divergence (default: the objective's) from the teacher, whose row i faces the block's.

    ValueError for a tail policy or a temperature that the teacher's record cannot serve.
    """
    tail = resolve_tail(objective.tail, teacher, objective.temperature)
    direction = divergence or objective.divergence
    measure = DIVERGENCES[direction]
    # Of old caches nothing bounds a reverse KL from above.
    floor = isinstance(teacher, TopKSignal) and teacher.log_least is not None
    bounded = direction != "reverse_kl" or floor

    def notes(found: Divergence) -> dict[str, Tensor]:
        if tail == "exact":
            return {name: found.value}
        values = {
            name: found.value,
            f"{name}_head_part": found.head,
            f"{name}_bucket_part": found.bucket,
            f"{name}_tail_part": found.tail,
            f"{name}_lower_bound": found.lower,
            f"{name}_student_tail_mass": found.student_tail_mass,
        }
        return values | ({f"{name}_upper_bound": found.upper} if bounded else {})

    def known(chunk: slice) -> Signal:
        here = _rows(teacher, chunk)
        # Heads and sketches multiply best by many rows at once.
        if isinstance(here, HiddenSignal):
            return DenseSignal(logits=here.dense_logits())
        if isinstance(here, TopKSignal) and needs_sketch(tail, objective.temperature):
            return here.decode()
        return here

    def rows(chunk: slice) -> RowLosses:
        here = known(chunk)
        settings = objective.tail, objective.temperature, objective.blend
        return lambda logits, part: notes(measure(logits, _rows(here, part), *settings))

    def reading(chunk: slice) -> Reading:
        here = known(chunk)
        assert isinstance(here, TopKSignal)
        weight = estimate_weight(tail, objective.blend)
        parts = teacher_parts(here, tail, 1.0, weight > 0)
        return Reading(
            teacher=here,
            estimate=parts[2],
            values=lambda rows: notes(lumped(direction, rows, here, parts, weight)),
        )

    estimated = tail in ("blend", "blend_template") and direction == "reverse_kl"
    has_tail = isinstance(teacher, TopKSignal) and teacher.ids.shape[1] < teacher.vocab_size
    readable = has_tail and objective.temperature == 1 and (tail == "bucket" or estimated)
    return LogitTerm(
        name=name,
        weight=weight,
        rows=rows,
        reduce=reduce,
        tail=tail,
        kept_mass=kept_mass(teacher),
        reading=reading if readable else None,
    )


def consistency_term(
    weight: float,
    hidden: Float[Tensor, "N D"],
    head: LogitsOf,
    objective: ObjectiveConfig,
    reduce: Callable[[Float[Tensor, " N"]], Float[Tensor, ""]],
) -> LogitTerm:
    """EPIC's KD: forward KL from what the head itself says of other states, row by row.

    Over the student's whole vocabulary; nothing flows into `hidden`. The head is the student's as
    it is now, and its teacher logits appear a chunk at a time, as all others do.
    """
    logits_of = without_gradient(head)
    hidden = hidden.detach()

    def rows(chunk: slice) -> RowLosses:
        here = DenseSignal(logits=logits_of(hidden[chunk]))

        def losses(logits: Tensor, part: slice) -> dict[str, Tensor]:
            teacher = _rows(here, part)
            return {"kd": forward_kl(logits, teacher, "exact", objective.temperature).value}

        return losses

    return LogitTerm(name="kd", weight=weight, rows=rows, reduce=reduce, tail="exact")


def head_rows(hidden: Float[Tensor, "N D"], terms: Sequence[LogitTerm]) -> HeadRows:
    """A block of rows whose terms share the logits of a chunk."""

    def losses(chunk: slice) -> RowLosses:
        each = [term.rows(chunk) for term in terms]

        def values(logits: Tensor, part: slice) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for term_losses in each:
                found |= term_losses(logits, part)
            return found

        return values

    weights = {term.name: term.row_weights(hidden) for term in terms}
    return HeadRows(hidden=hidden, losses=losses, weights=weights, in_place=_in_place(terms))


def _in_place(terms: Sequence[LogitTerm]) -> Callable[[slice], InPlaceLosses] | None:
    """Kernels read rows for any number of terms of which one at most has a teacher."""
    each = [term.reading for term in terms if term.reading is not None]
    if len(each) < len(terms) or sum(term.tail is not None for term in terms) > 1:
        return None

    def losses(chunk: slice) -> InPlaceLosses:
        readings = [reading(chunk) for reading in each]
        return lambda logits, weights: losses_in_place(logits, readings, weights)

    return losses


def _rows(signal: Signal, rows: slice) -> Signal:
    index = torch.arange(signal.num_rows)[rows]
    return signal if len(index) == signal.num_rows else signal.rows(index)
