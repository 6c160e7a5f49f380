"""Reads the settings of a stage from a file or from inline JSON.

A file of an earlier version, in which the fields of nested records lie at the top level, is read
as well.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import yaml

from jobs.cli.removed_flags import RENAMED_FIELDS
from pipeline.config.checks import URL
from teacher_cache.schema.strict_json import decode_mapping

_ONCE_FLAT = ("training", "settings")
"""Records whose fields lay at the top level in earlier versions."""


def read_config(config_class: type, text: str) -> object:
    """The settings in `text`: inline JSON, or the path of a JSON or YAML file.

    Raises ValueError where the file is missing or malformed, or a field is unknown or mistyped.
    """
    if text.lstrip().startswith("{"):
        where = "--config"
    else:
        file = Path(text)
        if re.match(URL, text):
            raise ValueError(f"--config {text} is a URL; download it and give the file")
        if not file.exists():
            raise ValueError(f"--config {file}: no such file")
        where, text = str(file), file.read_text()
    try:
        is_yaml = where.endswith((".yaml", ".yml"))
        settings = yaml.safe_load(text) if is_yaml else json.loads(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{where} is neither JSON nor YAML (.yaml, .yml): {error}") from error
    if isinstance(settings, dict):
        settings = _nested(config_class, settings, where)
    return decode_mapping(config_class, settings, where)


def _nested(config_class: Any, settings: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings with the fields of nested records moved from the top level into them."""
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(config_class)}
    for name, new in RENAMED_FIELDS.items():
        if name in settings and name not in fields:
            raise ValueError(f"{where}: {name} is now {new}; move it there")
    for record in _ONCE_FLAT:
        if record in fields and record not in settings:
            inner = {field.name for field in dataclasses.fields(fields[record])} - fields.keys()
            moved = {name: settings[name] for name in settings if name in inner}
            rest = {name: value for name, value in settings.items() if name not in inner}
            settings = {**rest, record: moved} if moved else rest
    return settings
