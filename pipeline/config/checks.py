"""Checks that several settings share."""

from dataclasses import fields
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16", "float16"]


CALIBRATION_TOKENS = 20_000
"""Vision tokens that fit a sketch's basis: fewer, or of a few alike images, and directions of the
next image are missing (docs/method.md)."""


QUALITY_SAMPLES = 2
"""Samples of a shard on which a build measures what its records lose, unless told otherwise."""


def at_least_one(record: object, *names: str) -> None:
    """Raise ValueError for the first of the named counts that is below 1."""
    for name in names:
        if getattr(record, name) < 1:
            raise ValueError(f"{name} must be >= 1, found {getattr(record, name)}")


def refuse_changed(record: Any, why: str, *names: str) -> None:
    """Raise ValueError for a setting that was changed and would not be looked at."""
    for field in fields(record):
        if field.name in names and getattr(record, field.name) != field.default:
            raise ValueError(f"{field.name} would have no effect: {why}")


def refuse_idle_choice(record: Any, compressor: str) -> None:
    """Raise ValueError for the seed of a compressor that draws nothing, or text for one that does.

    What a compressor that was registered looks at, nobody knows here.
    """
    if compressor in ("dart", "fastv"):
        refuse_changed(record, f"the compressor {compressor} draws nothing", "compress_seed")
    if compressor == "random":
        refuse_changed(record, "the compressor random looks at no text", "compress_text")
