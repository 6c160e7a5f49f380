"""JSON objects that hold a digest of themselves, so that damage is found when they are read.

The last field, `check`, is the first 16 hex digits of the SHA-256 of the others, written as JSON
with sorted keys; their order and white space do not count. Objects written before that field
existed are read unchecked.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from teacher_cache.schema.errors import DecodeError

CHECK = "check"


def to_checked_json(fields: Mapping[str, Any], indent: int | None = None) -> str:
    """The object as JSON, with its digest."""
    return json.dumps({**fields, CHECK: _digest(json.loads(json.dumps(fields)))}, indent=indent)


def from_checked_json(text: str | bytes, where: str) -> dict[str, Any]:
    """The fields without the digest; DecodeError, which opens with `where`, for damage."""
    try:
        found = json.loads(text)
    except ValueError as error:  # of JSON, or of UTF-8
        raise DecodeError(f"{where} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise DecodeError(f"{where} is damaged: found {type(found).__name__}, expected an object")
    fields: dict[str, Any] = dict(found)
    stored = fields.pop(CHECK, None)
    if stored is not None and stored != _digest(fields):
        raise DecodeError(
            f"{where} is damaged: its content does not have the digest that it states"
        )
    return fields


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
