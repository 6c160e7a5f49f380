"""What a teacher says at N positions, in one of three forms that answer the same questions.

    DenseSignal    every logit                                   (a live teacher, tests)
    HiddenSignal   the state before the head, and the head       (tier `hidden`)
    TopKSignal     K logits, the normaliser, the tail's mass,    (tiers `topk`, `topk+sketch`)
                   and perhaps a sketch of all other logits

A signal is `exact` when it knows every logit: the first two always, the third where K = V. Exact
signals of one teacher agree, those of K = V and `DenseSignal` to the bit. What a signal does not
know it refuses to tell; what to assume of it is the caller's choice (`divergence.py`, `cost.py`).
No gradient ever flows into a signal. Dimensions as in schema.py, N any number of positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from teacher_cache.head import LmHead
from teacher_cache.schema import SketchRecord, TeacherOutput, TopKRecord
from teacher_cache.sketch import SketchBasis, decode_logits


def at_least_float32(values: Tensor) -> Tensor:
    """Widen half precision before anything is summed; float32 and float64 pass unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSignal:
    """Every raw logit of every position."""

    logits: Float[Tensor, "N V"]

    @property
    def num_rows(self) -> int:
        """Number of positions."""
        return self.logits.shape[0]

    @property
    def vocab_size(self) -> int:
        """Number of vocabulary rows."""
        return self.logits.shape[1]

    @property
    def exact(self) -> bool:
        """Whether every logit is known."""
        return True

    def dense_logits(self) -> Float[Tensor, "N V"]:
        """The raw logits."""
        return self.logits.detach()

    def logits_at(self, ids: Int[Tensor, " C"]) -> Float[Tensor, "N C"]:
        """Raw logits at the vocabulary rows `ids`."""
        return self.logits.detach()[:, ids]

    def rows(self, index: Int[Tensor, " P"]) -> "DenseSignal":
        """The positions `index`, in that order."""
        return DenseSignal(logits=self.logits[index])

    def to(self, device: torch.device) -> "DenseSignal":
        """The same signal on another device."""
        return DenseSignal(logits=self.logits.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenSignal:
    """The final hidden states; the head turns them into logits, row for row."""

    hidden: Float[Tensor, "N D"]
    head: LmHead

    @property
    def num_rows(self) -> int:
        """Number of positions."""
        return self.hidden.shape[0]

    @property
    def vocab_size(self) -> int:
        """Number of vocabulary rows."""
        return self.head.vocab_size

    @property
    def exact(self) -> bool:
        """Whether every logit is known."""
        return True

    def dense_logits(self) -> Float[Tensor, "N V"]:
        """The raw logits, computed now."""
        with torch.no_grad():
            return self.head.logits(self.hidden)

    def logits_at(self, ids: Int[Tensor, " C"]) -> Float[Tensor, "N C"]:
        """Raw logits at the vocabulary rows `ids`; the other rows of the head are not touched."""
        with torch.no_grad():
            return self.head.logits_at(self.hidden, ids)

    def rows(self, index: Int[Tensor, " P"]) -> "HiddenSignal":
        """The positions `index`, in that order."""
        return HiddenSignal(hidden=self.hidden[index], head=self.head)

    def to(self, device: torch.device) -> "HiddenSignal":
        """The same signal on another device (free where it is already there)."""
        return HiddenSignal(hidden=self.hidden.to(device), head=_move_head(self.head, device))


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchCode:
    """A `SketchRecord` together with the basis that decodes it."""

    codes: Int8[Tensor, "N S"]
    scale: Float[Tensor, " N"]
    tail_shift: Float[Tensor, " N"]
    basis: SketchBasis

    def logits(self, ids: Int[Tensor, " C"] | None = None) -> Float[Tensor, "N columns"]:
        """Approximate raw logits at the vocabulary rows `ids`, or at all of them."""
        record = SketchRecord(codes=self.codes, scale=self.scale, tail_shift=self.tail_shift)
        return decode_logits(self.basis, record, ids)

    def each(self, change: Callable[[Tensor], Tensor]) -> "SketchCode":
        """Apply `change` (an index, a device move) to every tensor with one row per position."""
        return replace(
            self,
            codes=change(self.codes),
            scale=change(self.scale),
            tail_shift=change(self.tail_shift),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKSignal:
    """The K largest logits, their normaliser, the log mass of all others, perhaps a sketch."""

    ids: Int[Tensor, "N K"]
    logits: Float[Tensor, "N K"]
    logsumexp: Float[Tensor, " N"]
    log_tail: Float[Tensor, " N"]
    vocab_size: int
    sketch: SketchCode | None = None

    @property
    def num_rows(self) -> int:
        """Number of positions."""
        return self.ids.shape[0]

    @property
    def exact(self) -> bool:
        """Whether every logit is known: K = V."""
        return self.ids.shape[1] == self.vocab_size

    def dense_logits(self) -> Float[Tensor, "N V"]:
        """The raw logits where K = V, bit for bit the teacher's; ValueError otherwise."""
        if not self.exact:
            raise ValueError(
                f"a record of the {self.ids.shape[1]} largest of {self.vocab_size} logits does "
                "not hold them all; use `hidden` records, or top_k = the vocabulary's size"
            )
        return torch.empty_like(self.logits).scatter_(1, self.ids.long(), self.logits.detach())

    def logits_at(self, ids: Int[Tensor, " C"]) -> Float[Tensor, "N C"]:
        """Raw logits at `ids`: exact where K = V, else decoded from the sketch.

        ValueError without a sketch: an id outside the top-k has no stored logit at all. The
        decoded values are not overwritten by the stored ones: it makes no difference to a
        distance that sums over thousands of ids (docs/method.md), and keeps one error model.
        """
        if self.exact:
            return self.dense_logits()[:, ids]
        if self.sketch is None:
            raise ValueError(
                f"raw logits are known at the {self.ids.shape[1]} largest of {self.vocab_size} "
                "ids only; use records `topk+sketch` or `hidden`"
            )
        return self.sketch.logits(ids)

    def kept_log_probs(self) -> Float[Tensor, "N K"]:
        """Exact log-probabilities (temperature 1) of the K entries, at least float32."""
        return at_least_float32(self.logits.detach()) - self.logsumexp[:, None]

    def estimated_log_probs(self) -> Float[Tensor, "N V"]:
        """Log-probabilities that are exact on the K entries and, outside, the sketch's.

        The stored shift gives the estimate its true mass outside the top-k, so that every row is
        a distribution up to rounding (docs/method.md). ValueError without a sketch.
        """
        if self.sketch is None:
            raise ValueError("only records `topk+sketch` estimate the mass outside the top-k")
        outside = self.sketch.logits() + self.sketch.tail_shift[:, None]
        kept = self.kept_log_probs()
        return outside.to(kept.dtype).scatter(1, self.ids.long(), kept)

    def each(self, change: Callable[[Tensor], Tensor]) -> "TopKSignal":
        """Apply `change` (an index, a device move) to every tensor with one row per position."""
        return replace(
            self,
            ids=change(self.ids),
            logits=change(self.logits),
            logsumexp=change(self.logsumexp),
            log_tail=change(self.log_tail),
            sketch=None if self.sketch is None else self.sketch.each(change),
        )

    def rows(self, index: Int[Tensor, " P"]) -> "TopKSignal":
        """The positions `index`, in that order."""
        return self.each(lambda values: values[index])

    def to(self, device: torch.device) -> "TopKSignal":
        """The same signal on another device; a sketch's basis moves with `TeacherAssets.to`."""
        return self.each(lambda values: values.to(device))


Signal = DenseSignal | HiddenSignal | TopKSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAssets:
    """What a cache stores once: the head of tier `hidden`, the basis of tier `topk+sketch`."""

    head: LmHead | None = None
    sketch: SketchBasis | None = None

    def to(self, device: torch.device) -> "TeacherAssets":
        """The same assets on another device."""
        return TeacherAssets(
            head=None if self.head is None else _move_head(self.head, device),
            sketch=None if self.sketch is None else self.sketch.to(device),
        )


def vision_signal(output: TeacherOutput, assets: TeacherAssets) -> Signal:
    """The teacher at its M vision positions; ValueError where the record or its asset is absent."""
    if output.hidden is not None:
        return HiddenSignal(hidden=output.hidden.vision, head=_require_head(assets))
    if output.vision is None:
        raise ValueError("the cached sample was read without its part `vision` (or `hidden`)")
    sketch = None
    if output.sketch is not None:
        if assets.sketch is None:
            raise ValueError("sketch codes need the cache's basis: CacheReader.sketch_basis()")
        sketch = SketchCode(
            codes=output.sketch.codes,
            scale=output.sketch.scale,
            tail_shift=output.sketch.tail_shift,
            basis=assets.sketch,
        )
    return _from_record(output.vision, sketch)


def response_signal(output: TeacherOutput, assets: TeacherAssets) -> Signal:
    """The teacher over its R response tokens; ValueError where the record is absent."""
    if output.hidden is not None:
        return HiddenSignal(hidden=output.hidden.predicting, head=_require_head(assets))
    if output.response is None:
        raise ValueError("the cached sample was read without its part `response` (or `hidden`)")
    return _from_record(output.response, None)


def concatenate(signals: Sequence[Signal]) -> Signal:
    """One signal with the positions of all, in order.

    The signals come from one cache: one form, one head or basis (that of the first is kept), one
    vocabulary; ValueError otherwise, or if there is none.
    """
    first = signals[0] if signals else None
    if isinstance(first, DenseSignal):
        dense = [signal for signal in signals if isinstance(signal, DenseSignal)]
        if len(dense) == len(signals):
            return DenseSignal(logits=torch.cat([signal.logits for signal in dense]))
    if isinstance(first, HiddenSignal):
        states = [signal for signal in signals if isinstance(signal, HiddenSignal)]
        if len(states) == len(signals):
            hidden = torch.cat([signal.hidden for signal in states])
            return HiddenSignal(hidden=hidden, head=first.head)
    if isinstance(first, TopKSignal):
        kept = [signal for signal in signals if isinstance(signal, TopKSignal)]
        codes = [signal.sketch for signal in kept if signal.sketch is not None]
        if len(kept) == len(signals) and len(codes) in (0, len(signals)):
            return TopKSignal(
                ids=torch.cat([signal.ids for signal in kept]),
                logits=torch.cat([signal.logits for signal in kept]),
                logsumexp=torch.cat([signal.logsumexp for signal in kept]),
                log_tail=torch.cat([signal.log_tail for signal in kept]),
                vocab_size=first.vocab_size,
                sketch=_concatenate_codes(codes) if codes else None,
            )
    kinds = sorted({type(signal).__name__ for signal in signals})
    raise ValueError(f"cannot concatenate {len(signals)} signals of kinds {kinds} into one")


def _concatenate_codes(codes: Sequence[SketchCode]) -> SketchCode:
    return SketchCode(
        codes=torch.cat([code.codes for code in codes]),
        scale=torch.cat([code.scale for code in codes]),
        tail_shift=torch.cat([code.tail_shift for code in codes]),
        basis=codes[0].basis,
    )


def _from_record(record: TopKRecord, sketch: SketchCode | None) -> TopKSignal:
    return TopKSignal(
        ids=record.ids,
        logits=record.logits,
        logsumexp=record.logsumexp,
        log_tail=record.log_tail,
        vocab_size=record.vocab_size,
        sketch=sketch,
    )


def _require_head(assets: TeacherAssets) -> LmHead:
    if assets.head is None:
        raise ValueError("hidden records need the cache's LM head: CacheReader.head()")
    return assets.head


def _move_head(head: LmHead, device: torch.device) -> LmHead:
    return LmHead.from_tensors({name: value.to(device) for name, value in head.tensors().items()})
