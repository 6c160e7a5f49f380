"""The named alternatives of a cache, apart from everything heavy, so that settings load at once."""

from typing import Literal

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
