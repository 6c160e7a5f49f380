"""Makes one sample from an entry of a source: its conversation (turns.py), its images (media.py).

Anything wrong with a sample is a `SampleError` that names file, sample and remedy, whatever was
raised: a library's own error, or no memory for it, too. Nothing is repaired, and nothing that looks
like media is passed over in silence: it is counted, and a sample that would become text without it
is refused.
"""

import io
import json
from collections import Counter
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image, UnidentifiedImageError

from pipeline.sources.media import (
    IMAGE_FIELDS,
    ImageRules,
    listed_images,
    read_image,
    unread_media,
)
from pipeline.sources.turns import TURN_FIELDS, read_conversation
from teacher_cache.schema.errors import SampleError, describe
from teacher_cache.schema.samples import Sample, make_sample


@contextmanager
def refusing(where: str, source_id: str) -> Generator[None]:
    """Turn whatever is raised inside into a `SampleError` of this sample."""
    try:
        yield
    except SampleError:
        raise
    except Exception as error:
        raise SampleError(source_id, f"{where}: {describe(error)}") from error


def build_sample(
    where: str,
    source_id: str,
    entry: Mapping[str, Any],
    rules: ImageRules,
    unread: Counter[str],
    members: Sequence[bytes] = (),
    other_members: Collection[str] = (),
) -> Sample:
    """Check and assemble one sample; every error begins with `where` (file and place in it).

    `rules` say which images may be read. `members` are images that lie beside the entry, in place
    of those of its image field, and `other_members` names the files there that nobody reads.
    `unread` counts what looks like media and is not read.

    Raises SampleError for unknown roles, malformed turns, images that cannot be read or decoded,
    media that is not read in a sample without images, and whatever `Sample` refuses.
    """
    passed_over: list[str] = []
    try:
        passed_over += unread_media(entry, {*TURN_FIELDS, *IMAGE_FIELDS, "id"})
        passed_over += other_members
        listed = list(members) if members else listed_images(entry)
        found = read_conversation(entry, listed)
        passed_over += dict.fromkeys(found.unread)
        if passed_over and not found.images:
            raise ValueError(
                f"it has no image, but {', '.join(passed_over)}, which is not read: name the field "
                "of an image `image` and mark its place, or remove what is not an image"
            )
        unread.update(passed_over)
        images = [read_image(stored, rules) for stored in found.images]
        for number, data in enumerate(images):
            check_image(data, f"image {number}", rules.max_pixels)
        answers = (*found.references, *found.choices, found.category or "")
        _require_storable(source_id, *answers, *(message.text for message in found.messages))
        return make_sample(
            source_id,
            images,
            found.messages,
            references=found.references,
            choices=found.choices,
            category=found.category,
        )
    except SampleError as error:
        raise SampleError(source_id, f"{where}: {error.reason}") from error
    except Exception as error:
        more = "" if "not read" in str(error) or not passed_over else _also(passed_over)
        raise SampleError(source_id, f"{where}: {describe(error)}{more}") from error


def _also(passed_over: Sequence[str]) -> str:
    return (
        f" (not read: {', '.join(passed_over)}; if an image is there, name its field `image` or "
        "`images`)"
    )


def parse_json(data: bytes, where: str, source_id: str) -> Any:
    """Parse an entry's JSON; raises SampleError if it is not valid, or nested too deep."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
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


def check_image(data: bytes, name: str, max_pixels: int) -> None:
    """Decode an image to check that it is whole (JPEG at an eighth of its size, which is fast).

    Raises ValueError for bytes that Pillow cannot decode to the end, and, before it decodes them,
    for more than `max_pixels` pixels.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            _require_few_pixels(image.size, max_pixels)
            image.draft("L", (1, 1))
            image.load()
            _require_few_pixels(image.size, max_pixels)  # an icon's header may name another size
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        # Pillow's text holds a memory address; a stored reason must be the same in every run.
        unknown = isinstance(error, UnidentifiedImageError)
        why = "its format is unknown" if unknown else str(error) or describe(error)
        raise ValueError(
            f"{name} ({len(data)} bytes) cannot be decoded: {why}; replace it or leave the sample "
            "out"
        ) from error


def _require_storable(*texts: str) -> None:
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                f"the text {text[:40]!r} holds half of a surrogate pair (\\ud800 to \\udfff), "
                "which no file can store; correct it"
            )


def _require_few_pixels(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ValueError(f"it has {width} x {height} pixels, more than --max-pixels {max_pixels}")
