"""Defines one row of a shard as bytes, its checksums, and how it is stored."""

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import xxhash

from teacher_cache.codec.columns import VISION_COLUMNS
from teacher_cache.schema.errors import ShardCorruptError

KEY_PATTERN = re.compile(r"[0-9a-f]{32}(-[1-9][0-9]*)?")
"""A content digest; samples that repeat the content of another one are numbered from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    """One row as bytes: `messages` is JSON, `columns` maps column names to zstd frames.

    Complete, whether or not its images and vision columns are those of the row `shared_from`.
    """

    key: str
    source_id: str
    messages: str
    images: tuple[bytes, ...]
    frames: Mapping[str, bytes]
    shared_from: str | None = None

    def __post_init__(self) -> None:
        for key in (self.key, self.shared_from):
            if key is not None and not KEY_PATTERN.fullmatch(key):
                raise ValueError(f"row key {key!r} is not a sample key (32 hex digits, -n)")

    @property
    def without_shared(self) -> "EncodedRow":
        """The row without the images and vision columns that its owner stores."""
        if self.shared_from is None:
            return self
        columns = {name: frame for name, frame in self.frames.items() if name not in VISION_COLUMNS}
        return dataclasses.replace(self, images=(), frames=columns)

    def with_owner(self, owner: "EncodedRow") -> "EncodedRow":
        """The row with the images of its owner, and with those vision columns that `owner` has."""
        if self.images or not VISION_COLUMNS.isdisjoint(self.frames):
            raise ValueError(f"it has a vision record beside that of {self.shared_from}")
        shared = {name: owner.frames[name] for name in VISION_COLUMNS & owner.frames.keys()}
        return dataclasses.replace(self, images=owner.images, frames={**self.frames, **shared})

    @property
    def checks(self) -> str:
        """The JSON text stored beside the row: a sum of each piece, and one over all of them."""
        images = [_sum(image) for image in self.images]
        columns = {name: _sum(frame) for name, frame in sorted(self.frames.items())}
        return json.dumps({"images": images, "planes": columns, "row": self._sum(images, columns)})

    def verify(self, checks: str) -> None:
        """Raise `ShardCorruptError` unless `checks` was made from these pieces.

        Columns that the row was read without need not be there.
        """
        try:
            stored = json.loads(checks)
            images, columns = stored["images"], stored["planes"]
            intact = stored["row"] == self._sum(images, columns)
        except (ValueError, KeyError, TypeError, RecursionError):  # the last: JSON nested too deep
            intact, images, columns = False, [], {}
        if not intact:
            raise ShardCorruptError("its key, id, messages or checks are damaged")
        if images != [_sum(image) for image in self.images]:
            raise ShardCorruptError("its images are damaged")
        damaged = [name for name, frame in self.frames.items() if columns.get(name) != _sum(frame)]
        if damaged:
            raise ShardCorruptError(f"its columns {', '.join(sorted(damaged))} are damaged")

    @property
    def vision_sums(self) -> tuple[str, ...]:
        """Sums of the images and of the vision columns: equal in rows that share them."""
        shared = [(name, self.frames[name]) for name in sorted(VISION_COLUMNS & self.frames.keys())]
        return (*map(_sum, self.images), *(f"{name} {_sum(frame)}" for name, frame in shared))

    def _sum(self, images: list[str], columns: dict[str, str]) -> str:
        texts = [self.key, self.source_id, self.shared_from, self.messages]
        return _sum(json.dumps([*texts, images, sorted(columns.items())]).encode())


def _sum(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRow:
    """What a file stores of a row; `owner` is the number of the row that it shares from.

    A row that shares has neither images nor vision columns here.
    """

    row: EncodedRow
    checks: str
    owner: int | None

    def __post_init__(self) -> None:
        if (self.owner is None) != (self.row.shared_from is None):
            raise ValueError(f"it shares from {self.row.shared_from}, row {self.owner}")


def stored_rows(rows: Iterable[EncodedRow], columns: Collection[str]) -> Iterator[StoredRow]:
    """What a file stores of each row.

    Raises ValueError for a row with other columns, and for one whose owner does not come before it
    with equal images and vision columns.
    """
    owners: dict[str, tuple[int, tuple[str, ...]]] = {}
    for number, row in enumerate(rows):
        if set(row.frames) != set(columns):
            raise ValueError(
                f"row {row.key} has columns {sorted(row.frames)}, the shard holds {sorted(columns)}"
            )
        owner: int | None = None
        if row.shared_from is None:
            owners[row.key] = (number, row.vision_sums)
        else:
            owner, sums = owners.get(row.shared_from, (None, None))
            if sums != row.vision_sums:
                raise ValueError(
                    f"row {row.key} shares the vision record of {row.shared_from}, which is no "
                    "earlier row with the same images and vision columns"
                )
        yield StoredRow(row=row.without_shared, checks=row.checks, owner=owner)
