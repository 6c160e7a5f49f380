"""Decodes JSON and YAML into frozen dataclasses; names unknown, missing and mistyped fields.

Pydantic checks the fields. It coerces nothing (a "3" is not a 3) and ignores nothing.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, TypeVar

import pydantic

from teacher_cache.schema.errors import DecodeError

T = TypeVar("T")


class StrictRecord:
    """Base of the dataclasses that are read from files: no extra fields, exact types."""

    __slots__ = ()
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True}
    stored_names: ClassVar[Mapping[str, str]] = {}
    """Field name -> its name in files, where that is another one."""

    def __init_subclass__(cls) -> None:
        names = cls.stored_names
        alias = {"alias_generator": lambda name: names.get(name, name)} if names else {}
        cls.__pydantic_config__ = StrictRecord.__pydantic_config__ | alias


def decode_json(cls: type[T], text: str | bytes, where: str) -> T:
    """Build `cls` from JSON text; `where` (a file name) opens the error message."""
    try:
        return _adapter(cls).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        lines = [_describe(cls, problem) for problem in error.errors(include_url=False)]
    raise DecodeError(f"{where} is not a valid {cls.__name__}:\n" + "\n".join(lines))


def decode_mapping(cls: type[T], data: object, where: str) -> T:
    """Build `cls` from plain mappings and lists (as YAML gives them), as strictly as from JSON."""
    return decode_json(cls, json.dumps(data), where)


@cache
def _adapter(cls: type) -> Any:
    """Making one takes milliseconds; a cache has a commit record for every shard."""
    return pydantic.TypeAdapter(cls)


def _describe(cls: type, problem: Any) -> str:
    location: tuple[Any, ...] = problem["loc"]
    path = ".".join(map(str, location)) or "(top level)"
    if problem["type"] == "unexpected_keyword_argument":
        names = _field_names(cls, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(sorted(names))}"
        return f"  {path}: unknown field; {hint}"
    if problem["type"] in ("missing_keyword_only_argument", "missing"):
        return f"  {path}: missing"
    found = repr(problem.get("input"))
    return f"  {path}: {problem['msg'].lower()}, found {found[:100]}"


def _field_names(cls: type, path: tuple[Any, ...]) -> list[str]:
    owner: Any = cls
    for name in path:
        fields = {_stored_name(owner, f.name): f.type for f in dataclasses.fields(owner)}
        owner = fields.get(name)
        if not dataclasses.is_dataclass(owner):
            return []
    return [_stored_name(owner, f.name) for f in dataclasses.fields(owner)]


def _stored_name(owner: Any, name: str) -> str:
    return getattr(owner, "stored_names", {}).get(name, name)
