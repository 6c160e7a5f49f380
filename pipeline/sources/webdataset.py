"""Reads samples from WebDataset tars: a JSON or text member and any number of images for each.

Opening a tar reads an index of member offsets only, so any sample is one seek away. Members never
touch a path; nothing is unpickled. As in WebDataset, members belong together when their names agree
up to the first dot of the file name: `key.json` holds the turns, or `key.txt` a caption; `key.jpg`,
or `key.0.jpg`, `key.1.png`, ... are the images, ordered by the numbers in their names. Where the
text has no image marks, `key.mask.png` is no image; it is counted as not read. Refuses a sample
without a JSON or text member, with a member twice or stored sparsely, and a file that is no tar or
whose headers cannot be followed to the end.
"""

import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.tariterators import base_plus_ext

from pipeline.sources.conversations import (
    build_sample,
    entry_id,
    parse_json,
    refusing,
    require_object,
)
from pipeline.sources.media import (
    IMAGE_FIELDS,
    MAX_FILE_BYTES,
    ImageRules,
    is_media_file,
    is_other_member,
)
from pipeline.sources.turns import LAYOUTS, MARKED_LAYOUTS
from teacher_cache.schema.errors import SampleError, describe
from teacher_cache.schema.samples import Sample

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    tar: Path
    key: str
    members: dict[str, tuple[int, int]]
    """Extension -> (offset, number of bytes)."""
    refused: list[str]
    """What keeps the sample from being read."""


class TarSource:
    """The samples of some tars, in that order."""

    def __init__(self, name: str, tars: Sequence[Path], rules: ImageRules) -> None:
        self.name = name
        self._rules = rules
        self.unread = Counter[str]()
        self._entries = [entry for tar in tars for entry in _index(tar)]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self._entries[index]
        where = f"{entry.tar}, member {entry.key}"
        with refusing(where, entry.key):
            return self._sample(entry, where)

    def _sample(self, entry: _Entry, where: str) -> Sample:
        if entry.refused:
            raise ValueError("; ".join(entry.refused))
        fields = self._fields(entry, where)
        has_marks = any(fields.get(name) is not None for name in MARKED_LAYOUTS)
        names = sorted((n for n in entry.members if _is_image(n, has_marks)), key=_natural)
        images = [_read(entry, name) for name in names]
        if images:  # the fields say where the members were taken from
            fields = {name: value for name, value in fields.items() if name not in IMAGE_FIELDS}
        others = [n for n in entry.members if n not in names and is_media_file(f".{n}")]
        source_id = entry_id(fields, entry.key)
        return build_sample(where, source_id, fields, self._rules, self.unread, images, others)

    def _fields(self, entry: _Entry, where: str) -> dict[str, Any]:
        """What the JSON member says; the text member is a caption if that has no turns."""
        fields: dict[str, Any] = {}
        if "json" in entry.members:
            turns = parse_json(_read(entry, "json"), f"{where}.json", entry.key)
            if isinstance(turns, list):  # some sets store the bare list of turns
                turns = {"conversations": turns}
            fields = require_object(turns, f"{where}.json", entry.key)
        if "txt" in entry.members and not any(fields.get(name) is not None for name in LAYOUTS):
            fields = {**fields, "caption": _text(entry, where)}
        if not fields:
            found = ", ".join(sorted(entry.members))
            raise SampleError(entry.key, f"{where}: found {found}, expected a json member too")
        return fields


def _index(tar: Path) -> list[_Entry]:
    """List the samples of one tar from its headers; raises ValueError for any other file."""
    entries: dict[str, _Entry] = {}
    last = "its first member"
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.size < 0:  # the header behind it would be looked for in front of it
                    raise ValueError(f"member {member.name} has {member.size} bytes")
                last = f"the member behind {member.name}"
                key, extension = base_plus_ext(member.name)
                if not member.isreg() or key is None or extension is None:
                    continue
                entry = entries.setdefault(key, _Entry(tar=tar, key=key, members={}, refused=[]))
                if extension.lower() in entry.members:
                    entry.refused.append(f"member {member.name} is there twice")
                if member.issparse():
                    entry.refused.append(f"member {member.name} is stored sparsely; pack it anew")
                entry.members[extension.lower()] = (member.offset_data, member.size)
    except Exception as error:  # headers raise TarError, ValueError, MemoryError, ...
        raise ValueError(
            f"{tar}: cannot be read as an uncompressed tar: {last}: {describe(error)}; check the "
            "path, or copy the file again"
        ) from error
    return list(entries.values())


def _read(entry: _Entry, name: str) -> bytes:
    offset, num_bytes = entry.members[name]
    if num_bytes > MAX_FILE_BYTES:
        raise ValueError(f"{name} has {num_bytes:,} bytes, more than {MAX_FILE_BYTES:,}")
    with entry.tar.open("rb") as file:
        file.seek(offset)
        data = file.read(num_bytes)
    if len(data) != num_bytes:
        raise SampleError(
            entry.key, f"{entry.tar}: ends inside the member {entry.key}.{name}; copy it again"
        )
    return data


def _text(entry: _Entry, where: str) -> str:
    try:
        return _read(entry, "txt").decode().strip()
    except UnicodeDecodeError as error:
        raise SampleError(
            entry.key, f"{where}.txt: not UTF-8: {error.reason}; convert the text"
        ) from error


def _is_image(extension: str, has_marks: bool) -> bool:
    """Where the text marks its images, their number shows a mask that is none of them."""
    is_other = not has_marks and is_other_member(extension.rpartition(".")[0])
    return f".{extension}".endswith(IMAGE_ENDINGS) and not is_other


def _natural(extension: str) -> list[tuple[int, str]]:
    """Sort key under which image2 comes before image10."""
    pieces = re.split(r"(\d+)", extension)
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]
