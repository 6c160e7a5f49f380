"""The named alternatives of a cache, apart from everything heavy, so that settings load at once."""

from typing import Literal

RecordKind = Literal["topk", "topk+sketch", "hidden", "topk+hidden", "topk+sketch+hidden"]
"""What a cache holds: K largest logits; those and a PCA sketch; the final hidden states; or both
the states and one of the others."""

TierName = Literal["topk", "topk+sketch", "hidden"]
"""What a student can be trained from, in the order of exactness."""

ShardFormatName = Literal["arrow", "webdataset"]


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
