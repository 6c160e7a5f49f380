"""The named alternatives of a cache, and its grid, apart from everything heavy.

Settings load at once. Refuses what no cache could hold: cuts and ratios out of their range.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from teacher_cache.schema.strict_json import StrictRecord

RecordKind = Literal["topk", "topk+sketch", "hidden", "topk+hidden", "topk+sketch+hidden"]
"""What a cache holds: K largest logits; those and a PCA sketch; the final hidden states; or both
the states and one of the others."""

TierName = Literal["topk", "topk+sketch", "hidden"]
"""What a student can be trained from, in the order of exactness."""

ShardFormatName = Literal["arrow", "webdataset"]

LogitsCodec = Literal["exact", "affine8"]
"""How top-k logits are stored: to the bit, or as 8-bit codes between a position's smallest kept
logit and its largest, which are exact."""

AffinityDtype = Literal["float32", "float16", "int8"]
"""How cosines are stored; int8: as 8-bit codes between a text token's smallest and its largest."""

HiddenDtype = Literal["float32", "bfloat16", "int8"]
"""How hidden states are stored; int8: with a scale for each group of channels of each token."""


TextSource = Literal["instruction", "released"]
"""Text that may decide which vision tokens a model drops: the user's of the turn that shows the
images, or all text behind the images, answers included, as in EPIC's released code."""

MAX_RATIOS = 9
"""Ratios of a grid: each has planes of its own, named by one digit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GridSettings(StrictRecord):
    """How a teacher drops its own vision tokens for the further response records of a cache.

    Besides the ordinary record (ratio 0) each response token has one for every ratio.
    """

    compressor: str
    """A name in `student_train.compressors.COMPRESSORS`."""
    layer: int
    """Decoder layer, counted from 0, whose input is shortened."""
    ratios: tuple[float, ...]
    """Shares of the vision tokens that are dropped there, ascending, 0 < ratio < 1."""
    text: TextSource = "instruction"
    seed: int = 0
    """Of compressors that draw (random)."""

    def __post_init__(self) -> None:
        require_ratios(self.ratios)
        if self.layer < 1:
            raise ValueError(
                f"the layer is {self.layer}, expected 1 or more: the one below decides what is kept"
            )


def require_ratios(ratios: tuple[float, ...]) -> None:
    """Raise ValueError for ratios that make no grid: too many, out of (0, 1), not ascending."""
    if not 1 <= len(ratios) <= MAX_RATIOS:
        raise ValueError(f"found {len(ratios)} ratios, expected 1 to {MAX_RATIOS}")
    if not all(0 < ratio < 1 for ratio in ratios):
        raise ValueError(
            f"ratios are {ratios}, expected numbers between 0 and 1 (both left out): 0.75 drops "
            "three quarters of the vision tokens, and 0 is always there"
        )
    if any(low >= high for low, high in pairwise(ratios)):
        raise ValueError(f"ratios are {ratios}, expected ascending, each only once")


def holds(records: RecordKind, piece: Literal["topk", "sketch", "hidden"]) -> bool:
    """Whether the records have this piece."""
    return piece in records.split("+")


def tier_to_learn_from(held: RecordKind, wanted: TierName | None) -> TierName:
    """The tier wanted of a cache, or the most exact one that it holds; ValueError where absent."""
    tiers: tuple[TierName, ...] = ("hidden", "topk+sketch", "topk")
    found: list[TierName] = [tier for tier in tiers if set(tier.split("+")) <= set(held.split("+"))]
    if wanted is not None and wanted not in found:
        raise ValueError(
            f"the cache holds {held}, which has no {wanted} records; train from "
            f"{' or '.join(found)}, or add them by emkd extend"
        )
    return wanted or found[0]


def require_cut(k: int, mass: float, floor: int) -> None:
    """Raise ValueError unless `floor`..k entries can be cut where they hold `mass`."""
    if not 0 < mass < 1:
        raise ValueError(
            f"top_mass is {mass}, expected a probability between 0 and 1 (both left out); leave it "
            "away to keep top_k entries of every position"
        )
    if not 1 <= floor <= k:
        raise ValueError(f"top_k_floor is {floor}, expected 1..top_k, which is {k}")
