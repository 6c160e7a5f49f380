"""Promises of schema/options.py: record settings, how a spec stores them, and tiers."""

import dataclasses
import json
import math
from typing import Any

import pytest

from teacher_cache.codec.columns import TIER_PARTS
from teacher_cache.schema.errors import DecodeError
from teacher_cache.schema.manifest import CacheSpec, to_json
from teacher_cache.schema.options import (
    SETTING_PIECES,
    RecordSettings,
    TierName,
    holds,
    tier_to_learn_from,
)
from teacher_cache.schema.strict_json import decode_json
from tests.support.strategies import make_spec

TIERS: tuple[TierName, ...] = ("topk", "topk+sketch", "hidden")


def test_unknown_dtypes_are_refused() -> None:
    # Under the tests' type checks the wrong type is found first.
    with pytest.raises((ValueError, TypeError), match=r"affinity_dtype.*'int4'"):
        RecordSettings(affinity_dtype="int4")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bound", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", ["logits_max_error", "hidden_max_error", "affinity_max_error"])
def test_a_bound_that_promises_nothing_is_refused(name: str, bound: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {bound}, expected a finite bound"):
        RecordSettings(**{name: bound})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"records": "hidden", "top_k": 8}, "top_k would have no effect: records hidden have no"),
        ({"records": "topk", "sketch_rank": 8}, "sketch_rank would have no effect: records topk"),
        ({"records": "hidden", "calibration_tokens": 9}, "records hidden have no topk or sketch"),
        ({"records": "topk", "hidden_dtype": "int8"}, "records topk have no hidden"),
        ({"min_k": 2}, "min_k would have no effect: top_p is not set"),
        ({"logits_max_error": 0.1}, "logits are exact"),
        ({"affinity_max_error": 0.1}, "cosines are not int8"),
        ({"records": "hidden", "hidden_group": 8}, "hidden states are not int8"),
    ],
)
def test_a_changed_setting_without_effect_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecordSettings(**changes).refuse_unused()


def test_settings_at_their_defaults_are_never_refused() -> None:
    for records in TIER_PARTS:
        RecordSettings(records=records).refuse_unused()
    RecordSettings(records="topk", calibration_tokens=9, top_p=0.9, min_k=2).refuse_unused()


@pytest.mark.parametrize(
    "settings",
    [
        RecordSettings(records="topk", top_p=0.5, min_k=2, logits_codec="affine8"),
        RecordSettings(records="topk+sketch", top_k=9, sketch_rank=3, affinity_dtype="int8"),
        RecordSettings(records="hidden", hidden_dtype="int8", hidden_group=4),
        RecordSettings(records="topk+sketch+hidden", least_logits=False),
    ],
)
def test_a_spec_stores_the_settings_that_its_records_use(settings: RecordSettings) -> None:
    spec = make_spec(**settings.for_spec())
    assert spec.settings == settings
    for name in SETTING_PIECES.keys() - {"calibration_tokens", "least_logits"}:
        assert (getattr(spec, name) is None) == (
            name in settings.unused or getattr(settings, name) is None
        )
    assert decode_json(CacheSpec, to_json(spec), "a file") == spec


def test_a_setting_is_stored_under_the_name_that_caches_have() -> None:
    stored = json.loads(to_json(make_spec(top_p=0.5, min_k=2)))
    assert (stored["top_mass"], stored["top_k_floor"]) == (0.5, 2)
    later_fields = {"grid", "least_logits", "template_digest", "text", "pictures", "plugins"}
    python_names = {each.name for each in dataclasses.fields(CacheSpec)}
    assert python_names - stored.keys() - later_fields == {"top_p", "min_k"}
    with pytest.raises(DecodeError, match=r"top_p: unknown field; did you mean 'top_k'\?"):
        decode_json(CacheSpec, json.dumps({**stored, "top_p": 0.5}), "a file")


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
