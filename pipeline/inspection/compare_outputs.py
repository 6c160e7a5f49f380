"""Measures how far two runs of one teacher over one sample differ, quantity by quantity.

Every number that a cache stores belongs to one quantity. Entries of two top-k records are compared
by id. An id that one record lacks counts by how far its logit is above the smallest one kept there,
so a tie broken the other way is no difference. The scale of a quantity is the size of its numbers,
for tolerances. ValueError if the two have different tokens or parts.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from teacher_cache.codec.columns import parts_in
from teacher_cache.schema.teacher_output import SketchRecord, TeacherOutput, TopKRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Root mean square and largest magnitude of a set of numbers; zeros if it is empty."""

    rms: float
    largest: float

    @classmethod
    def of(cls, *values: Tensor) -> "Spread":
        """The spread of all values, whatever their dtypes and shapes."""
        flat = torch.cat([each.flatten().double().abs() for each in values])
        if not len(flat):
            return cls(rms=0.0, largest=0.0)
        return cls(rms=float(flat.square().mean().sqrt()), largest=float(flat.max()))

    def each(self, other: "Spread", join: Callable[[float, float], float]) -> "Spread":
        """Join two spreads, number by number."""
        return Spread(rms=join(self.rms, other.rms), largest=join(self.largest, other.largest))

    def times(self, factor: float) -> "Spread":
        """Multiply both numbers."""
        return Spread(rms=self.rms * factor, largest=self.largest * factor)

    def within(self, allowed: "Spread") -> bool:
        """Whether no number is larger than the other's, or NaN."""
        return self.rms <= allowed.rms and self.largest <= allowed.largest


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDifference:
    """One quantity of two outputs: their distance, and the size of the numbers."""

    apart: Spread
    scale: Spread
    dtype: torch.dtype
    """The dtype in which the quantity is stored."""


def output_differences(left: TeacherOutput, right: TeacherOutput) -> dict[str, OutputDifference]:
    """The quantities of two outputs for one sample, by name."""
    _require_same_tokens(left, right)
    found: dict[str, OutputDifference] = {}
    theirs = top_k_by_name(right)
    for name, record in top_k_by_name(left).items():
        found |= _top_k(name, record, theirs[name])
    if left.sketch is not None and right.sketch is not None:
        found["sketch"] = _difference([(_code(left.sketch), _code(right.sketch))])
    if left.affinity is not None and right.affinity is not None:
        found["affinity"] = _difference([(left.affinity.cosine, right.affinity.cosine)])
    if left.hidden is not None and right.hidden is not None:
        pairs = [
            (getattr(left.hidden, field.name), getattr(right.hidden, field.name))
            for field in dataclasses.fields(left.hidden)
        ]
        found["hidden states"] = _difference(
            [pair for pair in pairs if isinstance(pair[0], Tensor) and pair[0].is_floating_point()]
        )
    if left.hidden_grid is not None and right.hidden_grid is not None:
        for ratio, states in left.hidden_grid.items():
            found[f"hidden states at {ratio}"] = _difference([(states, right.hidden_grid[ratio])])
    return found


def top_k_by_name(output: TeacherOutput) -> dict[str, TopKRecord]:
    """The top-k records of an output by name; names of a grid's records hold the ratio."""
    found = {"vision": output.vision, "response": output.response}
    found |= {f"response at {ratio}": at for ratio, at in (output.response_grid or {}).items()}
    return {name: record for name, record in found.items() if record is not None}


def replaced_ids(left: TopKRecord, right: TopKRecord) -> tuple[int, int]:
    """(Kept ids of the left that the right lacks, kept ids of the left)."""
    _, known = _partners(left, right)
    kept = left.kept_mask
    return int((~known & kept).sum()), int(kept.sum())


def _require_same_tokens(left: TeacherOutput, right: TeacherOutput) -> None:
    same = (
        left.views == right.views
        and torch.equal(left.content_ids, right.content_ids)
        and torch.equal(left.is_response, right.is_response)
        and torch.equal(left.after_image, right.after_image)
    )
    if not same:
        raise ValueError(
            f"the tokens differ: {len(left.content_ids)} text tokens in views {left.views} on one "
            f"side, {len(right.content_ids)} in {right.views} on the other, or other ids"
        )
    if parts_in(left) != parts_in(right):
        raise ValueError(f"the parts differ: {parts_in(left)} and {parts_in(right)}")
    grids = [sorted(output.response_grid or output.hidden_grid or ()) for output in (left, right)]
    if grids[0] != grids[1]:
        raise ValueError(f"the ratios differ: {grids[0]} and {grids[1]}")


def _top_k(part: str, left: TopKRecord, right: TopKRecord) -> dict[str, OutputDifference]:
    scale = Spread.of(left.logits[left.kept_mask])
    dtype = left.logits.dtype
    entries = Spread.of(_entries(left, right), _entries(right, left))
    normaliser = Spread.of(left.logsumexp - right.logsumexp)
    # -inf where everything is kept; another count of entries has another tail.
    same = (left.log_tail == right.log_tail) | (left.counts != right.counts)
    tail = Spread.of((left.log_tail - right.log_tail).masked_fill(same, 0.0))
    found = {
        f"{part} {name}": OutputDifference(apart=apart, scale=scale, dtype=dtype)
        for name, apart in (("logits", entries), ("logsumexp", normaliser), ("log tail", tail))
    }
    if left.log_least is not None and right.log_least is not None:
        ours, theirs = left.log_least.double(), right.log_least.double()
        found[f"{part} least"] = OutputDifference(
            apart=Spread.of((ours - theirs).masked_fill(ours == theirs, 0.0)),
            scale=Spread.of(ours[ours.isfinite()]),
            dtype=left.log_least.dtype,
        )
    return found


def _entries(left: TopKRecord, right: TopKRecord) -> Float[Tensor, " entries"]:
    """The distance of every entry kept on the left from the right; see the top of this file."""
    partner, known = _partners(left, right)
    last = (right.counts - 1)[:, None].to(torch.int64)
    smallest = right.logits.double().gather(1, last)
    logits = left.logits.double()
    apart = torch.where(
        known,
        (logits - right.logits.double().gather(1, partner)).abs(),
        (logits - smallest).clamp(min=0.0),
    )
    return apart[left.kept_mask]


def _partners(left: TopKRecord, right: TopKRecord) -> tuple[Tensor, Tensor]:
    """The column on the right that holds each id of the left, and whether there is one."""
    ordered = right.ids.contiguous().sort(dim=1)
    column = torch.searchsorted(ordered.values, left.ids.contiguous())
    column = column.clamp(max=right.ids.shape[1] - 1)
    return ordered.indices.gather(1, column), ordered.values.gather(1, column) == left.ids


def _code(record: SketchRecord) -> Float[Tensor, "M S"]:
    return record.codes.double() * record.scale.double()[:, None]


def _difference(pairs: list[tuple[Tensor, Tensor]]) -> OutputDifference:
    return OutputDifference(
        apart=Spread.of(*(left.double() - right.double() for left, right in pairs)),
        scale=Spread.of(*(left for left, _ in pairs)),
        dtype=pairs[0][0].dtype,
    )
