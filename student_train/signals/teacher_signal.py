"""What a teacher says at N positions, in one of three forms that answer the same questions.

    DenseSignal    every logit                                   (a live teacher, tests)
    HiddenSignal   the state before the head, and the head       (tier `hidden`)
    TopKSignal     K logits, the normaliser, the tail's mass,    (tiers `topk`, `topk+sketch`)
                   perhaps a sketch of all others: top_k_signal.py

A signal is `exact` when it knows every logit: the first two always, the third where every position
keeps V. Exact signals of one teacher agree, those of K = V and `DenseSignal` to the bit. What a
signal does not know it refuses to tell; what to assume of it is the caller's choice
(`divergence.py`, `cost.py`).
No gradient ever flows into a signal. Dimensions as in schema.py, N any number of positions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from student_train.signals.top_k import SketchCode, TopKSignal, concatenate_top_k
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import SketchBasis
from teacher_cache.records.tail_template import TailTemplate
from teacher_cache.schema.teacher_output import TeacherOutput, TopKRecord


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

    def rows(self, index: Int[Tensor, " P"] | slice) -> "DenseSignal":
        """The positions `index`, in that order; a slice copies nothing."""
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

    def rows(self, index: Int[Tensor, " P"] | slice) -> "HiddenSignal":
        """The positions `index`, in that order; a slice copies nothing."""
        return HiddenSignal(hidden=self.hidden[index], head=self.head)

    def to(self, device: torch.device) -> "HiddenSignal":
        """The same signal on another device (free where it is already there)."""
        return HiddenSignal(hidden=self.hidden.to(device), head=_move_head(self.head, device))


Signal = DenseSignal | HiddenSignal | TopKSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAssets:
    """What a cache stores once: the head of tier `hidden`, the basis of tier `topk+sketch`, and of
    both top-k tiers the template of their tails, unless the cache is of an earlier day."""

    head: LmHead | None = None
    sketch: SketchBasis | None = None
    template: TailTemplate | None = None

    def to(self, device: torch.device) -> "TeacherAssets":
        """The same assets on another device."""
        return TeacherAssets(
            head=None if self.head is None else _move_head(self.head, device),
            sketch=None if self.sketch is None else self.sketch.to(device),
            template=None if self.template is None else self.template.to(device),
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
    template = None if assets.template is None else assets.template.vision
    return _from_record(output.vision, template, sketch)


def response_signal(output: TeacherOutput, assets: TeacherAssets) -> Signal:
    """The teacher over its R response tokens; ValueError where the record is absent."""
    if output.hidden is not None:
        return HiddenSignal(hidden=output.hidden.predicting, head=_require_head(assets))
    if output.response is None:
        raise ValueError("the cached sample was read without its part `response` (or `hidden`)")
    return _from_record(output.response, _response_template(assets))


def teacher_response_at(output: TeacherOutput, assets: TeacherAssets, wanted: float) -> Signal:
    """The teacher over its R response tokens, dropping at most the share `wanted` of its own vision
    tokens: at the largest ratio of the sample's grid that is no more than that (`grid_ratio`).

    What was read without its grid, or is of a cache that has none, is at ratio 0, which drops
    nothing: `response_signal`. ValueError where the record or its asset is absent.
    """
    grid = output.hidden_grid if output.hidden is not None else output.response_grid
    ratio = grid_ratio(grid or (), wanted)
    if ratio == 0:
        return response_signal(output, assets)
    if output.hidden is not None and output.hidden_grid is not None:
        return HiddenSignal(hidden=output.hidden_grid[ratio], head=_require_head(assets))
    assert output.response_grid is not None
    return _from_record(output.response_grid[ratio], _response_template(assets))


def grid_ratio(ratios: Iterable[float], wanted: float) -> float:
    """The largest of the ratios that is at most `wanted`, or 0, which every cache has.

    Differences such as 0.7 - 0.2 count as the decimals that they stand for.
    """
    return max((ratio for ratio in ratios if ratio <= wanted + 1e-9), default=0.0)


def concatenate(signals: Sequence[Signal]) -> Signal:
    """One signal with the positions of all, in order.

    The signals come from one cache: one form, one head or basis (that of the first is kept), one
    vocabulary; ValueError otherwise, or if there is none. Top-k signals may differ in K. Autocast
    to bfloat16, which refuses to join float16 tensors, has no say in it.
    """
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        return _concatenated(signals)


def _concatenated(signals: Sequence[Signal]) -> Signal:
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
        if len(kept) == len(signals):
            return concatenate_top_k(kept)
    kinds = sorted({type(signal).__name__ for signal in signals})
    raise ValueError(f"cannot concatenate {len(signals)} signals of kinds {kinds} into one")


def _response_template(assets: TeacherAssets) -> Tensor | None:
    return None if assets.template is None else assets.template.response


def _from_record(
    record: TopKRecord, template: Tensor | None, sketch: SketchCode | None = None
) -> TopKSignal:
    return TopKSignal(
        ids=record.ids,
        logits=record.logits,
        logsumexp=record.logsumexp,
        log_tail=record.log_tail,
        vocab_size=record.vocab_size,
        num_kept=record.num_kept,
        log_least=record.log_least,
        sketch=sketch,
        template=template,
    )


def _require_head(assets: TeacherAssets) -> LmHead:
    if assets.head is None:
        raise ValueError("hidden records need the cache's LM head: CacheReader.head()")
    return assets.head


def _move_head(head: LmHead, device: torch.device) -> LmHead:
    return LmHead.from_tensors({name: value.to(device) for name, value in head.tensors().items()})
