"""Stores shards as WebDataset tars with the same frames; webdataset and tarfile can read them.

Members of a row, sorted: <key>.<n>.image.<jpg|png|...>, <key>.<column>.zst, <key>.sample.json. The
first member, __shard__/metadata.json, is skipped by webdataset. A row that shares images and vision
columns has no such members; its sample.json names the owner. Times, owners and order are fixed.
Opening reads headers only; payloads are memory-mapped. Refuses members of any other name or kind
(links, folders, pickles), and never extracts to a path.
"""

import json
import mmap
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from webdataset.writer import TarWriter

from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.shards.encoded_row import KEY_PATTERN, EncodedRow, StoredRow, stored_rows
from teacher_cache.shards.shard import Shard, ShardFormat

_METADATA = "__shard__/metadata"
_MEMBER = re.compile(
    rf"(?P<key>{KEY_PATTERN.pattern})\."
    r"(sample\.json|(?P<image>[0-9]+)\.image\.[a-z]+|(?P<column>[a-z][a-z0-9_]*)\.zst)"
)
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"RIFF": "webp"}

_Place = tuple[int, int]  # offset and size of a member's payload


class WebDatasetFormat(ShardFormat):
    """Tar in webdataset's layout; see `ShardFormat`."""

    suffix = ".tar"

    def write(
        self,
        path: Path,
        rows: Iterable[EncodedRow],
        columns: Collection[str],
        metadata: Mapping[str, str],
    ) -> None:
        """Write a new file at `path`; each row has exactly the columns named."""
        with path.open("xb") as file, TarWriter(file, user="", group="", mtime=0) as writer:
            text = json.dumps(dict(sorted(metadata.items())), indent=1)
            writer.write({"__key__": _METADATA, "json": text.encode()})
            for stored in stored_rows(rows, columns):
                writer.write({"__key__": stored.row.key, **_members(stored)})

    def open(self, path: Path) -> "TarShard":
        """Index a file by its headers; raises `ShardCorruptError` if it is not a shard."""
        try:
            return TarShard(path)
        except (tarfile.TarError, OSError, ValueError, KeyError, EOFError, RecursionError) as error:
            raise ShardCorruptError(f"{path} is not an intact shard: {error}") from error


def _members(stored: StoredRow) -> dict[str, bytes]:
    row = stored.row
    text = {
        "source_id": row.source_id,
        "messages": row.messages,
        "checks": stored.checks,
        "shared_from": row.shared_from,
    }
    members = {f"{name}.zst": frame for name, frame in row.frames.items()}
    for number, image in enumerate(row.images):
        kinds = [kind for magic, kind in _MAGIC.items() if image.startswith(magic)]
        members[f"{number}.image.{kinds[0] if kinds else 'bin'}"] = image
    return {**members, "sample.json": json.dumps(text, indent=1).encode()}


class _PlainMember(tarfile.TarInfo):
    """A tar header; refuses all but plain files before tarfile acts on the header."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        # tarfile reads as many bytes as a header of another kind claims; a negative size makes it
        # read the same header for ever. isreg() would accept sparse files.
        if self.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or self.size < 0:
            raise ValueError(f"member {self.name!r} is not a plain file")
        return super()._proc_member(tar)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]


class TarShard(Shard):
    """A tar with an index of its members; payloads stay on the disk until they are read."""

    def __init__(self, path: Path) -> None:
        self._names: set[str] = set()
        self._text: dict[str, _Place] = {}
        self._images: dict[str, dict[int, _Place]] = {}
        self._columns: dict[str, dict[str, _Place]] = {}
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            metadata, end = self._index(file)
        # tarfile takes a damaged header for the end; only zeros follow the true end.
        tail = len(self._map) - end
        if not 1024 <= tail <= 2 * tarfile.RECORDSIZE or any(self._map[end:]):
            raise ValueError(f"the tar does not end at byte {end}, where its members do")
        self._keys = list(self._text)
        self._rows = {key: row for row, key in enumerate(self._keys)}
        super().__init__(path, metadata, len(self._keys))

    def _index(self, file: BinaryIO) -> tuple[dict[str, str], int]:
        metadata: dict[str, str] | None = None
        end = 0
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_PlainMember) as tar:
            for member in tar:
                place = (member.offset_data, member.size)
                end = member.offset_data + -(-member.size // 512) * 512
                if end > len(self._map):
                    raise ValueError(f"member {member.name!r} is cut off")
                if metadata is None:
                    if member.name != f"{_METADATA}.json":
                        raise ValueError(f"its first member is {member.name!r}")
                    metadata = json.loads(self._bytes(place))
                else:
                    self._place(member.name, place)
        if metadata is None:
            raise ValueError("it is empty")
        return metadata, end

    def _place(self, name: str, place: _Place) -> None:
        match = _MEMBER.fullmatch(name)
        if match is None:
            raise ValueError(f"member {name!r} does not belong in a shard")
        key, column, image = match["key"], match["column"], match["image"]
        if name in self._names:
            raise ValueError(f"member {name!r} is there twice")
        self._names.add(name)
        if column is not None:
            self._columns.setdefault(key, {})[column] = place
        elif image is not None:
            self._images.setdefault(key, {})[int(image)] = place
        else:
            self._text[key] = place

    def _bytes(self, place: _Place) -> bytes:
        offset, size = place
        return self._map[offset : offset + size]

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of the frames of each column, and of `images`, from the headers."""
        found = Counter[str]()
        for places in self._images.values():
            found["images"] += sum(size for _, size in places.values())
        for places in self._columns.values():
            found.update({name: size for name, (_, size) in places.items()})
        return dict(found)

    def _fetch(self, row: int, columns: Collection[str]) -> StoredRow:
        key = self._keys[row]
        text = json.loads(self._bytes(self._text[key]))
        images, frames = self._images.get(key, {}), self._columns.get(key, {})
        encoded = EncodedRow(
            key=key,
            source_id=text["source_id"],
            messages=text["messages"],
            images=tuple(self._bytes(images[number]) for number in range(len(images))),
            frames={name: self._bytes(frames[name]) for name in frames.keys() & set(columns)},
            shared_from=text["shared_from"],
        )
        owner = None if encoded.shared_from is None else self._rows[encoded.shared_from]
        return StoredRow(row=encoded, checks=text["checks"], owner=owner)
