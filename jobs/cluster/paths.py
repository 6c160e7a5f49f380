"""Makes the paths of settings absolute, so that they mean the same in every process and machine.

A worker of Ray Train runs in a folder of its own, and a job's driver on another machine. URLs and
hub ids stay as they are.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from teacher_cache.storage.open_store import is_url

Config = TypeVar("Config")

_MAY_BE_LOCAL = ("path", "source", "teacher", "student", "model")
"""Fields that hold a path, a pattern of paths, a URL or a hub id."""
_LOCATIONS = ("out", "cache")
"""Fields that hold a folder, which may not exist yet, or a URL."""


def absolute(config: Config) -> Config:
    """The same settings with every path absolute, nested records included."""
    record: Any = config
    found = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return dataclasses.replace(record, **{n: _absolute(n, value) for n, value in found.items()})


def config_json(config: Any) -> str:
    """The settings as one line of JSON, every path absolute; `--config` reads it."""
    return json.dumps(dataclasses.asdict(absolute(config)), sort_keys=True, default=str)


def _absolute(name: str, value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return absolute(value)
    if isinstance(value, Path):
        return value.absolute()
    if isinstance(value, str) and _is_local(name, value):
        return str(Path(value).absolute())
    return value


def _is_local(name: str, text: str) -> bool:
    """Whether a text that may be a URL or a hub id is a local path or a pattern of local paths."""
    if name in _LOCATIONS:
        return not is_url(text)
    return name in _MAY_BE_LOCAL and (Path(text).exists() or "{" in text)
