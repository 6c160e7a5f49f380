"""Promises of schema/options.py: which tiers a cache's records can be learned from."""

import pytest

from teacher_cache.codec.columns import TIER_PARTS
from teacher_cache.schema.options import TierName, holds, tier_to_learn_from

TIERS: tuple[TierName, ...] = ("topk", "topk+sketch", "hidden")


def test_a_tier_is_there_where_all_its_parts_are() -> None:
    for held, parts in TIER_PARTS.items():
        for tier in TIERS:
            if TIER_PARTS[tier] <= parts:
                assert tier_to_learn_from(held, tier) == tier
            else:
                with pytest.raises(ValueError, match=f"which has no {tier.replace('+', '.')} rec"):
                    tier_to_learn_from(held, tier)


def test_the_most_exact_tier_is_the_default() -> None:
    assert tier_to_learn_from("topk", None) == "topk"
    assert tier_to_learn_from("topk+sketch", None) == "topk+sketch"
    for held in ("hidden", "topk+hidden", "topk+sketch+hidden"):
        assert tier_to_learn_from(held, None) == "hidden"


def test_pieces_are_names_not_letters() -> None:
    assert holds("topk+sketch+hidden", "sketch")
    assert not holds("topk+hidden", "sketch")
    assert not holds("hidden", "topk")
