"""Finds what an entry stores of images and other media, and what of it nobody reads."""

import base64
import binascii
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipeline.config.checks import MAX_PIXELS
from teacher_cache.schema.regular_file import read_regular

MAX_FILE_BYTES = 2**30
"""Most bytes of an image file, and of a member of a tar."""

_ENDINGS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".svg"),
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".wav", ".mp3", ".flac", ".ogg", ".npy"),
)
_NAME = re.compile(
    r"(.*_)?(image|img|picture|photo|video|audio|frame|mask|depth|pixel)s?"
    r"(_?\d+)?(_(path|file|url|bytes|base64|list|data))?s?",
    re.IGNORECASE,
)
_ARRAY = re.compile(r"(.*_)?(pixels?|pixel_values|depth|depth_map)", re.IGNORECASE)
_OTHER = re.compile(r"(.*[._-])?(mask|depth|seg|segmentation)s?", re.IGNORECASE)
_WEIGHTS = re.compile(r"(loss|sample|token)?_?(weight|mask)s?|loss", re.IGNORECASE)
IMAGE_FIELDS = ("image", "images")
"""The fields that images are read from, one of them in an entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRules:
    """Which images may be read: `root` is the folder of image paths; None: images are embedded."""

    root: Path | None = None
    confined: bool = False
    """Refuse paths that lead out of the root."""
    max_pixels: int = MAX_PIXELS


def listed_images(entry: Mapping[str, Any]) -> list[Any]:
    """The images of an entry's image field as it stores them; ValueError if both fields are set."""
    given = [entry[name] for name in IMAGE_FIELDS if entry.get(name) not in (None, [], "")]
    if len(given) > 1:
        raise ValueError("found both `image` and `images`, expected one; drop the other")
    found = given[0] if given else []
    images = list(found) if isinstance(found, list) else [found]
    for image in images:
        if not isinstance(image, (str, bytes, Mapping)):
            raise ValueError(f"`image` must be a path or a list of paths, found {image!r}"[:200])
    return images


def unread_media(entry: Mapping[str, Any], read: Collection[str]) -> list[str]:
    """The fields outside `read` that look like an image, a video, audio, a mask or a weight."""
    return [name for name, value in entry.items() if name not in read and _is_media(name, value)]


def is_media_name(name: str) -> bool:
    """Whether a field of this name may hold media: image_0, video, mask, ..."""
    return bool(_NAME.fullmatch(name) or _WEIGHTS.fullmatch(name))


def is_media_file(name: str) -> bool:
    """Whether a file of this name is an image, a video, audio or an array."""
    return name.lower().endswith(_ENDINGS)


def is_other_member(stem: str) -> bool:
    """Whether a member beside a sample's images is a mask or a depth map, by its name."""
    return bool(_OTHER.fullmatch(stem))


def _is_media(name: str, value: Any) -> bool:
    if value is None or value in ("", [], {}, b""):
        return False
    if _WEIGHTS.fullmatch(name):
        return True
    if isinstance(value, bytes) or (isinstance(value, Mapping) and "bytes" in value):
        return True
    if isinstance(value, str):
        return value.startswith("data:") or is_media_file(value) or bool(_NAME.fullmatch(name))
    if isinstance(value, list):
        return bool(_ARRAY.fullmatch(name)) or any(_is_media(name, each) for each in value[:16])
    if isinstance(value, Mapping):
        named = bool(_NAME.fullmatch(name))
        return named or any(_is_media(str(inner), each) for inner, each in value.items())
    return False


def read_image(stored: Any, rules: ImageRules) -> bytes:
    """The encoded bytes of an image: bytes, a struct with `bytes` or `path`, a data URL, a path.

    Paths are relative to the root; without one, only embedded images are read. Pipes, devices and
    folders are refused unopened. ValueError names what was found and what to do.
    """
    if isinstance(stored, Mapping):
        stored = stored.get("bytes") or stored.get("path") or stored
    if isinstance(stored, bytes):
        return stored
    if not isinstance(stored, str):
        raise ValueError(
            f"an image must be a path, or a struct with `bytes`, found {str(stored)[:80]}"
        )
    if stored.startswith("file://"):
        stored = unquote(stored.removeprefix("file://"))
    if stored.startswith("data:"):
        head, _, text = stored.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("it is not in base64")
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"the image {stored[:40]!r} cannot be read: {error}") from error
    if re.match(r"[a-z][a-z0-9+.-]*://", stored):
        raise ValueError(f"image {stored[:200]!r} is a URL; download it and give a path")
    if len(stored) > 1000:
        raise ValueError(
            f"an image is the text {stored[:40]!r} of {len(stored)} characters, expected a path; "
            "write `data:image/png;base64,` in front of base64"
        )
    root = rules.root
    if root is None:
        raise ValueError(
            f"an image is the path {stored!r}; embed the image files: a struct with `bytes`"
        )
    file = root / stored
    try:
        if rules.confined:
            file = _confined(file, root)
        return read_regular(file, MAX_FILE_BYTES)
    except OSError as error:
        raise ValueError(
            f"image {file} cannot be read ({error.strerror}); `image` is relative to the image "
            f"root {root}: set it if the images are elsewhere"
        ) from error


def _confined(file: Path, root: Path) -> Path:
    """The file, all links followed; ValueError where it lies outside the root."""
    inside, found = root.resolve(), file.resolve()
    if not found.is_relative_to(inside):
        raise ValueError(
            f"image {file} leads to {found}, outside the image root {inside}; --confine-images "
            "refuses that: copy the image into the root, or trust the source and omit the flag"
        )
    return found
