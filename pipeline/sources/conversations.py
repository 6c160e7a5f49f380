"""Makes one sample from what a source stores: turns in one of two forms, and encoded images.

Accepts LLaVA's turns ({"from": "human" | "gpt" | "system", "value": text}) and the hub's messages
({"role": ..., "content": text or a list of text and image parts}). Anything wrong with a sample is
a `SampleError` that names file, sample and remedy. Nothing is repaired: an image without its
`<image>` placeholder is refused, not put in front.
"""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, UnidentifiedImageError

from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.samples import IMAGE_PLACEHOLDER, Message, Role, Sample, make_sample

TURN_COLUMNS = ("conversations", "messages")
"""Fields that may hold the turns; the first one present is read."""

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def build_sample(
    where: str, source_id: str, images: Sequence[bytes], entry: Mapping[str, Any]
) -> Sample:
    """Check and assemble one sample; every error begins with `where` (file and place in it).

    Raises SampleError for unknown roles, malformed turns, images that cannot be decoded, and
    whatever `Sample` refuses (placeholders, order of turns).
    """
    try:
        messages = parse_turns(entry)
        for number, data in enumerate(images):
            check_image(data, f"image {number}")
        return make_sample(source_id, images, messages)
    except SampleError as error:
        raise SampleError(source_id, f"{where}: {error.reason}") from error
    except ValueError as error:
        raise SampleError(source_id, f"{where}: {error}") from error


def parse_json(data: bytes, where: str, source_id: str) -> Any:
    """Parse an entry's JSON; raises SampleError if it is not valid."""
    try:
        return json.loads(data)
    except ValueError as error:
        raise SampleError(source_id, f"{where}: not valid JSON: {error}") from error


def require_object(entry: Any, where: str, source_id: str) -> dict[str, Any]:
    """The entry, if it is a JSON object; raises SampleError if not."""
    if isinstance(entry, dict):
        return entry
    found = type(entry).__name__
    raise SampleError(source_id, f"{where}: expected a JSON object, found {found}")


def entry_id(entry: Mapping[str, Any], default: str) -> str:
    """The source's name for this entry: its `id`, or `default` without one."""
    found = entry.get("id")
    return default if found is None else str(found)


def parse_turns(entry: Mapping[str, Any]) -> tuple[Message, ...]:
    """Read the turns of an entry; raises ValueError that names what was found."""
    column = next((name for name in TURN_COLUMNS if entry.get(name) is not None), None)
    if column is None:
        raise ValueError(
            f"found the fields {sorted(entry)}, expected one of {', '.join(TURN_COLUMNS)}"
        )
    turns = entry[column]
    if not isinstance(turns, list):
        raise ValueError(f"{column} must be a list of turns, found {type(turns).__name__}")
    return tuple(_parse_turn(turn, number) for number, turn in enumerate(turns))


def check_image(data: bytes, name: str) -> None:
    """Decode an image to check that it is whole (JPEG at an eighth of its size, which is fast).

    Raises ValueError for bytes that Pillow cannot decode to the end.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("L", (1, 1))
            image.load()
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        # Pillow's text holds a memory address; a stored reason must be the same in every run.
        unknown = isinstance(error, UnidentifiedImageError)
        why = "its format is unknown" if unknown else str(error)
        raise ValueError(
            f"{name} ({len(data)} bytes) cannot be decoded: {why}; replace it or leave the sample "
            "out"
        ) from error


def _parse_turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number} must be a mapping, found {type(turn).__name__}")
    name = turn.get("from", turn.get("role"))
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise ValueError(
            f"turn {number} has the role {name!r}, expected one of {', '.join(_ROLES)}"
        )
    return Message(role=role, text=_text(turn.get("value", turn.get("content")), number))


def _text(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(
            f"turn {number} must have a text in `value` or `content`, found "
            f"{type(content).__name__}"
        )
    parts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            parts.append(IMAGE_PLACEHOLDER)
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            raise ValueError(
                f"turn {number} holds the part {part!r}, expected "
                '{"type": "text", "text": ...} or {"type": "image"}'
            )
    return "".join(parts)
