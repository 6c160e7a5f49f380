"""Checks that several records of settings share."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

URL = r"[A-Za-z][A-Za-z0-9+.-]+:/"
"""Begins a URL, also one that lost a slash as a `Path`; a drive letter does not match."""

Dtype = Literal["float32", "bfloat16", "float16"]

MAX_PIXELS = 178_956_970
"""Most pixels of an image: above it Pillow refuses to decode (512 MiB as RGB)."""


def at_least_one(record: object, *names: str) -> None:
    """Raise ValueError for the first of the named counts that is below 1."""
    for name in names:
        if getattr(record, name) < 1:
            raise ValueError(f"{name} must be >= 1, found {getattr(record, name)}")


def require_max_pixels(max_pixels: int) -> None:
    """Raise ValueError for a bound below 1, or above Pillow's own."""
    if not 1 <= max_pixels <= MAX_PIXELS:
        raise ValueError(
            f"max_pixels is {max_pixels}, expected 1 to {MAX_PIXELS}: Pillow decodes no more"
        )


def refuse_url_paths(record: Any) -> None:
    """Raise ValueError for a field that holds a path which was written as a URL.

    `Path` drops a slash of it, so that s3://bucket/run would become the local folder `s3:`.
    """
    for field in fields(record):
        value = getattr(record, field.name)
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path) and re.match(URL, str(path)):
                raise ValueError(
                    f"{field.name} is {path}, which looks like a URL; give a folder or file on "
                    "this machine (caches alone may lie in an object store)"
                )


def refuse_changed(record: Any, why: str, *names: str) -> None:
    """Raise ValueError for a field that differs from its default and would not be used."""
    for field in fields(record):
        if field.name in names and getattr(record, field.name) != field.default:
            raise ValueError(f"{field.name} would have no effect: {why}")


def refuse_idle_choice(record: Any, compressor: str) -> None:
    """Raise ValueError for the seed or the text source of a compressor that does not use it.

    Nothing is known here about a compressor that a user registered: it may use both.
    """
    if compressor in ("dart", "fastv"):
        why = f"the compressor {compressor} draws no random numbers"
        refuse_changed(record, why, "compress_seed", "seed")
    if compressor == "random":
        refuse_changed(record, "the compressor random uses no text", "compress_text", "text")
