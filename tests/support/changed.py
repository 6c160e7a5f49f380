"""Changes settings of a build or an extension, wherever they are nested."""

import dataclasses
from typing import Any, TypeVar

from pipeline.config.build import BuildConfig
from pipeline.config.extend import ExtendConfig
from teacher_cache.schema.options import RecordSettings

Config = TypeVar("Config", BuildConfig, ExtendConfig)


def changed(config: Config, **changes: Any) -> Config:
    """The configuration with these fields changed, its own or those of its record settings."""
    names = {field.name for field in dataclasses.fields(RecordSettings)}
    inner = {name: value for name, value in changes.items() if name in names}
    outer = {name: value for name, value in changes.items() if name not in names}
    if inner:
        outer["settings"] = dataclasses.replace(config.settings or RecordSettings(), **inner)
    return dataclasses.replace(config, **outer)
