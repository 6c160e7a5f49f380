"""The third form of a signal: each position's largest logits, and perhaps a sketch of the rest.

Promise: what is kept is told exactly; the log mass of everything else is known, its shape only as
far as a sketch estimates it, and any other question is refused. Positions may keep different
numbers of entries, a single one or all V: then K is the largest number, and the rest of a row
repeats its first entry (schema.py, TopKRecord). Scattering by `ids` is safe, sums over entries
need `kept_mask`. Dimensions as in schema.py, N any number of positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from student_train.ops.precision import at_least_float32
from student_train.signals.sketch_code import SketchCode, concatenate_codes


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKSignal:
    """The largest logits, their normaliser, the log mass of all others, perhaps a sketch.

    Position i keeps `num_kept[i]` entries, or all K where that is None. Where the cache has them,
    `log_least` is a floor under the log-probability of every entry, and `template` the log shares
    of an average tail, one for all positions.
    """

    ids: Int[Tensor, "N K"]
    logits: Float[Tensor, "N K"]
    logsumexp: Float[Tensor, " N"]
    log_tail: Float[Tensor, " N"]
    vocab_size: int
    num_kept: Int[Tensor, " N"] | None = None
    log_least: Float[Tensor, " N"] | None = None
    sketch: SketchCode | None = None
    template: Float[Tensor, " V"] | None = None

    @property
    def num_rows(self) -> int:
        """Number of positions."""
        return self.ids.shape[0]

    @property
    def exact(self) -> bool:
        """Whether every logit is known: every position keeps V."""
        return self.ids.shape[1] == self.vocab_size == self.least_kept

    @property
    def least_kept(self) -> int:
        """Every position knows at least this many of its largest logits."""
        if self.num_kept is None or not self.num_rows:
            return self.ids.shape[1]
        return int(self.num_kept.min())

    @property
    def counts(self) -> Int[Tensor, " N"]:
        """Number of entries that each position keeps."""
        if self.num_kept is not None:
            return self.num_kept
        return self.ids.new_full((self.num_rows,), self.ids.shape[1])

    @property
    def kept_mask(self) -> Bool[Tensor, "N K"] | None:
        """Which entries are kept and no repetitions; None where that is all of them."""
        if self.num_kept is None:
            return None
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.num_kept[:, None]

    def dense_logits(self) -> Float[Tensor, "N V"]:
        """The raw logits where exact, bit for bit the teacher's; ValueError otherwise."""
        if not self.exact:
            raise ValueError(
                f"a record of the {self.least_kept} largest of {self.vocab_size} logits does "
                "not hold them all; use `hidden` records, or top_k = the vocabulary's size"
            )
        return torch.empty_like(self.logits).scatter_(1, self.ids.long(), self.logits.detach())

    def logits_at(self, ids: Int[Tensor, " C"]) -> Float[Tensor, "N C"]:
        """Raw logits at `ids`: exact where a position keeps V, else decoded from the sketch.

        ValueError without a sketch: an id outside the top-k has no stored logit at all. The
        decoded values are not overwritten by the stored ones: it makes no difference to a
        distance that sums over thousands of ids (docs/method.md), and keeps one error model.
        """
        if self.exact:
            return self.dense_logits()[:, ids]
        if self.sketch is None:
            raise ValueError(
                f"raw logits are known at the {self.least_kept} largest of {self.vocab_size} "
                "ids only; use records `topk+sketch` or `hidden`"
            )
        decoded = self.sketch.logits(ids)
        if self.ids.shape[1] < self.vocab_size:
            return decoded
        whole = self.counts == self.vocab_size
        known = self.rows(whole.nonzero()[:, 0]).logits_at(ids)
        decoded = decoded.to(torch.promote_types(decoded.dtype, known.dtype))
        return decoded.masked_scatter(whole[:, None], known.to(decoded.dtype))

    def kept_log_probs(self) -> Float[Tensor, "N K"]:
        """Exact log-probabilities (temperature 1) of the entries, at least float32."""
        return at_least_float32(self.logits.detach()) - self.logsumexp[:, None]

    def estimated_log_probs(self) -> Float[Tensor, "N V"]:
        """Log-probabilities that are exact on the kept entries and, outside, the sketch's.

        The stored shift gives the estimate its true mass outside the top-k, so that every row is
        a distribution up to rounding (docs/method.md). ValueError without a sketch.
        """
        if self.sketch is None:
            raise ValueError("only records `topk+sketch` estimate the mass outside the top-k")
        outside = self.sketch.logits() + self.sketch.tail_shift[:, None]
        kept = self.kept_log_probs()
        return outside.to(kept.dtype).scatter(1, self.ids.long(), kept)

    def templated_log_probs(self) -> Float[Tensor, "N V"]:
        """Log-probabilities outside the kept entries: the template, scaled to the true mass.

        Those of kept entries mean nothing. ValueError without a template.
        """
        if self.template is None:
            raise ValueError("this cache has no template of the tails; build it anew to have one")
        template = at_least_float32(self.template)
        log_mass = at_least_float32(self.log_tail) - self._log_outside(template)
        return template + log_mass[:, None]

    def _log_outside(self, template: Float[Tensor, " V"]) -> Float[Tensor, " N"]:
        """Log of the template's share outside each position's kept entries."""
        ids = self.ids.long()
        kept = (template[ids].double() - template.double().logsumexp(dim=0)).exp()
        mask = self.kept_mask
        share = 1 - (kept if mask is None else kept.masked_fill(~mask, 0.0)).sum(dim=1)
        log_share = share.clamp(min=0).log()
        little = (share < 1e-6).nonzero()[:, 0]  # then subtraction has lost too much of it
        if len(little):
            rest = template.double().expand(len(little), -1).scatter(1, ids[little], -torch.inf)
            log_share[little] = rest.logsumexp(dim=1) - template.double().logsumexp(dim=0)
        return log_share.to(template.dtype)

    def decode(self) -> "TopKSignal":
        """The same with the sketch's logits at hand, N x V of them; itself without a sketch."""
        return self if self.sketch is None else replace(self, sketch=self.sketch.decode())

    def mean_tail_logit(self) -> Float[Tensor, " N"]:
        """Mean of the sketch's logits outside the kept entries. ValueError without a sketch."""
        if self.sketch is None:
            raise ValueError("only records `topk+sketch` estimate logits outside the top-k")
        tail = self.sketch.logits().scatter(1, self.ids.long(), 0.0).sum(dim=1)
        return tail / (self.vocab_size - self.counts)

    def each(self, change: Callable[[Tensor], Tensor]) -> "TopKSignal":
        """Apply `change` (an index, a device move) to every tensor with one row per position."""
        return replace(
            self,
            ids=change(self.ids),
            logits=change(self.logits),
            logsumexp=change(self.logsumexp),
            log_tail=change(self.log_tail),
            num_kept=None if self.num_kept is None else change(self.num_kept),
            log_least=None if self.log_least is None else change(self.log_least),
            sketch=None if self.sketch is None else self.sketch.each(change),
        )

    def rows(self, index: Int[Tensor, " P"] | slice) -> "TopKSignal":
        """The positions `index`, in that order; a slice copies nothing."""
        return self.each(lambda values: values[index])

    def to(self, device: torch.device) -> "TopKSignal":
        """The same signal on another device; a sketch's basis moves with `TeacherAssets.to`."""
        return self.each(lambda values: values.to(device))


def concatenate_top_k(signals: Sequence[TopKSignal]) -> TopKSignal:
    """The positions of all signals, in order; they may differ in K.

    What belongs to the cache, such as a basis, is that of the first. ValueError where only some
    have a sketch, or a floor.
    """
    codes = [signal.sketch for signal in signals if signal.sketch is not None]
    floors = [signal.log_least for signal in signals if signal.log_least is not None]
    for found, what in ((codes, "a sketch"), (floors, "a least probability")):
        if len(found) not in (0, len(signals)):
            raise ValueError(
                f"cannot concatenate {len(signals)} top-k signals of which {len(found)} have {what}"
            )
    width = max(signal.ids.shape[1] for signal in signals)
    rectangular = all(
        signal.num_kept is None and signal.ids.shape[1] == width for signal in signals
    )

    def join(entries: Sequence[Tensor]) -> Tensor:
        """One tensor of the largest width; shorter rows repeat their first entry."""
        if all(values.shape[1] == width for values in entries):
            return torch.cat(list(entries))
        more = [values[:, :1].expand(-1, width - values.shape[1]) for values in entries]
        return torch.cat([torch.cat(pair, dim=1) for pair in zip(entries, more, strict=True)])

    return TopKSignal(
        ids=join([signal.ids for signal in signals]),
        logits=join([signal.logits for signal in signals]),
        logsumexp=torch.cat([signal.logsumexp for signal in signals]),
        log_tail=torch.cat([signal.log_tail for signal in signals]),
        vocab_size=signals[0].vocab_size,
        num_kept=None if rectangular else torch.cat([signal.counts for signal in signals]),
        log_least=torch.cat(floors) if floors else None,
        sketch=concatenate_codes(codes) if codes else None,
        template=signals[0].template,
    )
