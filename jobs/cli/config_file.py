"""Reads the settings of a stage from a file or from inline JSON.

A file of an earlier version, in which the fields of nested records lie at the top level, is read
as well. YAML is read as JSON's values alone: no tags, no aliases (a few lines of them can stand for
gigabytes), no dates. What is wrong is one ValueError with line and column.
"""

import dataclasses
import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from jobs.cli.removed_flags import RENAMED_FIELDS
from pipeline.config.checks import URL
from teacher_cache.schema.errors import describe, printable
from teacher_cache.schema.regular_file import read_regular
from teacher_cache.schema.strict_json import decode_mapping

MAX_DEPTH = 20
"""How deep settings may be nested; the deepest record of ours has 4 levels."""
_MAX_BYTES = 2**24

_ONCE_FLAT = ("training", "settings")
"""Records whose fields lay at the top level in earlier versions."""


def read_config(config_class: type, text: str) -> object:
    """The settings in `text`: inline JSON, or the path of a JSON or YAML file.

    Raises ValueError where the file is missing or malformed, or a field is unknown or mistyped.
    """
    if text.lstrip().startswith("{"):
        where = "--config"
    else:
        if re.match(URL, text):
            raise ValueError(f"--config {text} is a URL; download it and give the file")
        where, text = text, _file_text(Path(text))
    is_yaml = where.endswith((".yaml", ".yml"))
    try:
        settings = _from_yaml(text) if is_yaml else json.loads(text, object_pairs_hook=_unrepeated)
    except yaml.MarkedYAMLError as error:
        mark, what = error.problem_mark, error.problem or error.context
        at = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{where}{at}: {printable(str(what))}; correct the YAML") from error
    except yaml.reader.ReaderError as error:
        at = _place(text, int(error.position))
        raise ValueError(
            f"{where}, {at}: the character {error.character:#x} is not allowed in YAML; remove it"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}, line {error.lineno}, column {error.colno}: {error.msg}; correct the JSON, "
            "or name a YAML file .yaml or .yml"
        ) from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{where}: {describe(error)}; correct it") from error
    if not isinstance(settings, dict):
        found = "nothing" if settings is None else type(settings).__name__
        raise ValueError(f"{where}: expected settings by name, found {found} at the top level")
    return decode_mapping(config_class, _nested(config_class, settings, where), where)


def _file_text(file: Path) -> str:
    try:
        data = read_regular(file, _MAX_BYTES)
    except FileNotFoundError as error:
        raise ValueError(f"--config {file}: no such file") from error
    except OSError as error:
        raise ValueError(f"--config {file}: cannot be read ({error.strerror})") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", "replace")
        raise ValueError(
            f"--config {file}, {_place(before, len(before))}: byte {data[error.start]:#04x} is not "
            "UTF-8; save the file as UTF-8 text"
        ) from error


def _place(text: str, position: int) -> str:
    before = text[:position]
    return f"line {before.count(chr(10)) + 1}, column {position - before.rfind(chr(10))}"


class _JsonValues(yaml.SafeLoader):
    """Gives what JSON can hold; refuses a key that is there twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"{key.value!r} is there twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_JsonValues.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith((":timestamp", ":merge"))]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _from_yaml(text: str) -> Any:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = f"the alias *{event.anchor} is not read: write its value out"
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag:
            problem = f"the tag {event.tag} is not read: remove it"
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            problem = f"nested deeper than {MAX_DEPTH} levels"
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
    return yaml.load(text, Loader=_JsonValues)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


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
