"""Makes one sample from an entry of a source: its conversation (turns.py), its images (media.py).

Anything wrong with a sample is a `SampleError` that names file, sample and remedy. Nothing is
repaired, and nothing that looks like media is passed over in silence: it is counted, and a sample
that would become text without it is refused.
"""

import io
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from pipeline.sources.media import IMAGE_FIELDS, listed_images, read_image, unread_media
from pipeline.sources.turns import TURN_FIELDS, read_conversation
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.samples import Sample, make_sample


def build_sample(
    where: str,
    source_id: str,
    entry: Mapping[str, Any],
    root: Path | None,
    unread: Counter[str],
    members: Sequence[bytes] = (),
    other_members: Collection[str] = (),
) -> Sample:
    """Check and assemble one sample; every error begins with `where` (file and place in it).

    `root` is the folder of image paths; None: images are embedded. `members` are images that lie
    beside the entry, in place of those of its image field, and `other_members` names the files
    there that nobody reads. `unread` counts what looks like media and is not read.

    Raises SampleError for unknown roles, malformed turns, images that cannot be read or decoded,
    media that is not read in a sample without images, and whatever `Sample` refuses.
    """
    passed_over = [*unread_media(entry, {*TURN_FIELDS, *IMAGE_FIELDS, "id"}), *other_members]
    try:
        listed = list(members) if members else listed_images(entry)
        found = read_conversation(entry, listed)
        passed_over += dict.fromkeys(found.unread)
        if passed_over and not found.images:
            raise ValueError(
                f"it has no image, but {', '.join(passed_over)}, which is not read: name the field "
                "of an image `image` and mark its place, or remove what is not an image"
            )
        unread.update(passed_over)
        images = [read_image(stored, root) for stored in found.images]
        for number, data in enumerate(images):
            check_image(data, f"image {number}")
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
    except ValueError as error:
        more = "" if "not read" in str(error) or not passed_over else _also(passed_over)
        raise SampleError(source_id, f"{where}: {error}{more}") from error


def _also(passed_over: Sequence[str]) -> str:
    return (
        f" (not read: {', '.join(passed_over)}; if an image is there, name its field `image` or "
        "`images`)"
    )


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
