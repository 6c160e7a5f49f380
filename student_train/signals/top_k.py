"""A teacher's signal of its largest logits at each position, perhaps with a sketch of the rest.

What is kept is exact. The log mass of everything else is known; its shape only as far as a sketch
or a template estimates it. Positions may keep different numbers of entries, from one to all V: then
K is the largest number, and the rest of a row repeats its first entry. Scattering by ids is safe;
sums over entries need `kept_mask`. Dimensions as in teacher_output.py, N any number of positions.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from student_train.ops.precision import at_least_float32
from student_train.signals.sketch_code import SketchCode, concatenate_codes
from teacher_cache.schema.teacher_output import TopKRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKSignal:
    """A top-k record, perhaps with a sketch of its positions or the template of an average tail."""

    record: TopKRecord
    sketch: SketchCode | None = None
    template: Float[Tensor, " V"] | None = None
    """Log shares of an average tail, one for all positions."""

    @property
    def num_rows(self) -> int:
        """Number of positions."""
        return self.record.ids.shape[0]

    @property
    def vocab_size(self) -> int:
        """Number of vocabulary rows."""
        return self.record.vocab_size

    @property
    def exact(self) -> bool:
        """Whether every logit is known: every position keeps V."""
        return self.max_kept == self.vocab_size == self.min_kept

    @property
    def max_kept(self) -> int:
        """K: no position keeps more entries."""
        return self.record.ids.shape[1]

    @property
    def min_kept(self) -> int:
        """Every position knows at least this many of its largest logits."""
        num_kept = self.record.num_kept
        return self.max_kept if num_kept is None or not self.num_rows else int(num_kept.min())

    @property
    def counts(self) -> Int[Tensor, " N"]:
        """Number of entries that each position keeps."""
        return self.record.counts

    @property
    def kept_mask(self) -> Bool[Tensor, "N K"] | None:
        """Which entries are kept and not padding; None where that is all of them."""
        return None if self.record.num_kept is None else self.record.kept_mask

    def dense_logits(self) -> Float[Tensor, "N V"]:
        """The raw logits where exact, bit for bit the teacher's; ValueError otherwise."""
        if not self.exact:
            raise ValueError(
                f"a record of the {self.min_kept} largest of {self.vocab_size} logits does "
                "not hold them all; use `hidden` records, or top_k = the vocabulary's size"
            )
        logits = self.record.logits
        return torch.empty_like(logits).scatter_(1, self.record.ids.long(), logits.detach())

    def logits_at(self, ids: Int[Tensor, " C"]) -> Float[Tensor, "N C"]:
        """Raw logits at `ids`: exact where a position keeps V, else decoded from the sketch.

        Stored logits do not replace decoded ones: it makes no difference to a distance that sums
        over thousands of ids (docs/method.md), and there is one error model. ValueError without a
        sketch, because ids outside the top-k have no stored logit.
        """
        if self.exact:
            return self.dense_logits()[:, ids]
        if self.sketch is None:
            raise ValueError(
                f"raw logits are known at the {self.min_kept} largest of {self.vocab_size} "
                "ids only; use records `topk+sketch` or `hidden`"
            )
        decoded = self.sketch.logits(ids)
        if self.max_kept < self.vocab_size:
            return decoded
        whole = self.counts == self.vocab_size
        known = self.rows(whole.nonzero()[:, 0]).logits_at(ids)
        decoded = decoded.to(torch.promote_types(decoded.dtype, known.dtype))
        return decoded.masked_scatter(whole[:, None], known.to(decoded.dtype))

    def kept_log_probs(self) -> Float[Tensor, "N K"]:
        """Exact log-probabilities (temperature 1) of the entries, at least float32."""
        return at_least_float32(self.record.logits.detach()) - self.record.logsumexp[:, None]

    def estimated_log_probs(self) -> Float[Tensor, "N V"]:
        """Log-probabilities: exact on the kept entries, the sketch's outside.

        The stored shift gives the outside its true mass, so each row is a distribution up to
        rounding (docs/method.md). ValueError without a sketch.
        """
        if self.sketch is None:
            raise ValueError("only records `topk+sketch` estimate the mass outside the top-k")
        outside = self.sketch.logits() + self.sketch.tail_shift[:, None]
        kept = self.kept_log_probs()
        return outside.to(kept.dtype).scatter(1, self.record.ids.long(), kept)

    def templated_log_probs(self) -> Float[Tensor, "N V"]:
        """Log-probabilities outside the kept entries: the template, scaled to the true mass.

        Values at kept entries mean nothing. ValueError without a template.
        """
        if self.template is None:
            raise ValueError("this cache has no template of the tails; build it again to get one")
        template = at_least_float32(self.template)
        log_mass = at_least_float32(self.record.log_tail) - self._log_outside(template)
        return template + log_mass[:, None]

    def _log_outside(self, template: Float[Tensor, " V"]) -> Float[Tensor, " N"]:
        """Log of the template's share outside each position's kept entries."""
        ids = self.record.ids.long()
        kept = (template[ids].double() - template.double().logsumexp(dim=0)).exp()
        mask = self.kept_mask
        share = 1 - (kept if mask is None else kept.masked_fill(~mask, 0.0)).sum(dim=1)
        log_share = share.clamp(min=0).log()
        little = (share < 1e-6).nonzero()[:, 0]  # too small for the subtraction above
        if len(little):
            rest = template.double().expand(len(little), -1).scatter(1, ids[little], -torch.inf)
            log_share[little] = rest.logsumexp(dim=1) - template.double().logsumexp(dim=0)
        return log_share.to(template.dtype)

    def decode(self) -> "TopKSignal":
        """The same with all N x V logits of the sketch decoded; itself without a sketch."""
        return self if self.sketch is None else replace(self, sketch=self.sketch.decode())

    def each(self, change: Callable[[Tensor], Tensor]) -> "TopKSignal":
        """Apply `change` (an index, a device move) to every tensor with one row per position."""
        record = copy.copy(self.record)  # its rows need no second check
        for name in ("ids", "logits", "logsumexp", "log_tail", "num_kept", "log_least"):
            values: Tensor | None = getattr(record, name)
            object.__setattr__(record, name, None if values is None else change(values))
        sketch = None if self.sketch is None else self.sketch.each(change)
        return replace(self, record=record, sketch=sketch)

    def rows(self, index: Int[Tensor, " P"] | slice) -> "TopKSignal":
        """The positions `index`, in that order; a slice copies nothing."""
        return self.each(lambda values: values[index])

    def to(self, device: torch.device) -> "TopKSignal":
        """The same signal on another device; a sketch's basis moves with `TeacherAssets.to`."""
        return self.each(lambda values: values.to(device))


def concatenate_top_k(signals: Sequence[TopKSignal]) -> TopKSignal:
    """The positions of all signals, in order; they may differ in K.

    Basis and template are those of the first. ValueError where only some have a sketch, or a floor.
    """
    codes = [signal.sketch for signal in signals if signal.sketch is not None]
    floors = [s.record.log_least for s in signals if s.record.log_least is not None]
    for found, what in ((codes, "a sketch"), (floors, "a least probability")):
        if len(found) not in (0, len(signals)):
            raise ValueError(
                f"cannot concatenate {len(signals)} top-k signals of which {len(found)} have {what}"
            )
    width = max(signal.max_kept for signal in signals)
    rectangular = all(s.record.num_kept is None and s.max_kept == width for s in signals)

    def join(entries: Sequence[Tensor]) -> Tensor:
        """One tensor of the largest width; shorter rows repeat their first entry."""
        if all(values.shape[1] == width for values in entries):
            return torch.cat(list(entries))
        more = [values[:, :1].expand(-1, width - values.shape[1]) for values in entries]
        return torch.cat([torch.cat(pair, dim=1) for pair in zip(entries, more, strict=True)])

    records = [signal.record for signal in signals]
    record = TopKRecord(
        ids=join([each.ids for each in records]),
        logits=join([each.logits for each in records]),
        logsumexp=torch.cat([each.logsumexp for each in records]),
        log_tail=torch.cat([each.log_tail for each in records]),
        vocab_size=records[0].vocab_size,
        num_kept=None if rectangular else torch.cat([each.counts for each in records]),
        log_least=torch.cat(floors) if floors else None,
    )
    sketch = concatenate_codes(codes) if codes else None
    return TopKSignal(record=record, sketch=sketch, template=signals[0].template)
