"""Settings whose paths mean the same everywhere: Ray's workers do not share our folder.

A worker of Ray Train runs in a folder of its own and a job's driver on another machine, so every
path of a stage is made absolute before it leaves this process. URLs are left as they are.
"""

import dataclasses
import json
from pathlib import Path
from typing import TypeVar

from teacher_cache.schema.strict_json import decode_json
from teacher_cache.storage.open_store import is_url

Config = TypeVar("Config")

_MAY_BE_LOCAL = ("path", "source", "teacher", "student", "model")
_LOCATIONS = ("out", "cache")
"""Folders, which need not be there yet, or URLs."""


def absolute(config: Config) -> Config:
    """The same settings with every path absolute (hub ids and other names stay as they are)."""
    return decode_json(type(config), to_json(config), type(config).__name__)


def to_json(config: object) -> str:
    """The settings as one line of JSON, every path absolute; `--config` reads it back."""
    return json.dumps(_absolute(dataclasses.asdict(config)), sort_keys=True)  # pyright: ignore[reportArgumentType]


def _absolute(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: str(Path(item).absolute())
            if isinstance(item, str) and _is_local(key, item)
            else _absolute(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_absolute(item) for item in value]
    if isinstance(value, Path):
        return str(value.absolute())
    return value


def _is_local(key: str, text: str) -> bool:
    """Whether a string that may be a URL or a hub id is a path here, or a pattern of paths."""
    if key in _LOCATIONS:
        return not is_url(text)
    return key in _MAY_BE_LOCAL and (Path(text).exists() or "{" in text)
