"""What the two shard formats have in common: encoded rows, their checks, and one interface.

A row is stored as its parts plus `checks`, a JSON text that binds them together: the xxh3 sums of
every image and frame, and `row`, the sum over key, source id, messages and all those sums. So a
flipped byte, a frame of another row or another plane, a lost plane: each is a `ShardCorruptError`
that names file and sample before a number is returned, and only what is asked for is read.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import xxhash

from teacher_cache.manifest import ShardCorruptError
from teacher_cache.settings import ShardFormatName

KEY_PATTERN = re.compile(r"[0-9a-f]{32}(-[1-9][0-9]*)?")
"""A content digest; samples that repeat another one's content are numbered from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    """One row as bytes: `messages` is JSON, `planes` maps plane names to zstd frames."""

    key: str
    source_id: str
    messages: str
    images: tuple[bytes, ...]
    planes: Mapping[str, bytes]

    def __post_init__(self) -> None:
        if not KEY_PATTERN.fullmatch(self.key):
            raise ValueError(f"row key {self.key!r} is not a sample key (32 hex digits, -n)")

    @property
    def checks(self) -> str:
        """The text that is stored beside the row and binds its pieces together."""
        images = [_sum(image) for image in self.images]
        planes = {name: _sum(frame) for name, frame in sorted(self.planes.items())}
        return json.dumps({"images": images, "planes": planes, "row": self._sum(images, planes)})

    def verify(self, checks: str) -> None:
        """Raise `ShardCorruptError` unless each piece is the one that `checks` was made of.

        Planes that the row was read without need not be there.
        """
        try:
            stored = json.loads(checks)
            images, planes = stored["images"], stored["planes"]
            intact = stored["row"] == self._sum(images, planes)
        except (ValueError, KeyError, TypeError):
            intact, images, planes = False, [], {}
        if not intact:
            raise ShardCorruptError("its key, id, messages or checks are damaged")
        if images != [_sum(image) for image in self.images]:
            raise ShardCorruptError("its images are damaged")
        damaged = [name for name, frame in self.planes.items() if planes.get(name) != _sum(frame)]
        if damaged:
            raise ShardCorruptError(f"its planes {', '.join(sorted(damaged))} are damaged")

    def _sum(self, images: list[str], planes: dict[str, str]) -> str:
        text = json.dumps([self.key, self.source_id, self.messages, images, sorted(planes.items())])
        return _sum(text.encode())


def _sum(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)


class Shard(ABC):
    """An open shard; `read` may be called from several threads at once.

    `metadata` is what `write` was given, `num_rows` the number of rows.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str], num_rows: int) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self.num_rows = num_rows

    @abstractmethod
    def _fetch(self, row: int, planes: Collection[str]) -> tuple[EncodedRow, str]:
        """Row and checks as stored; raises ValueError, KeyError, TypeError or OSError."""

    def read(self, row: int, planes: Collection[str]) -> EncodedRow:
        """Row `row` with the given planes only; every byte returned has been checked."""
        try:
            encoded, checks = self._fetch(row, planes)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ShardCorruptError(f"{self.path}: row {row} cannot be read: {error}") from error
        try:
            encoded.verify(checks)
        except (ShardCorruptError, TypeError) as error:
            raise ShardCorruptError(
                f"{self.path}: sample {encoded.key} (row {row}): {error}"
            ) from error
        return encoded

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all rows, in order; reads every row's sample, but none of its planes."""
        return tuple(self.read(row, ()).key for row in range(self.num_rows))


class ShardFormat(ABC):
    """One way to put rows in a file: equal rows give equal bytes."""

    suffix: ClassVar[str]
    """End of a shard's file name."""

    @abstractmethod
    def write(
        self,
        path: Path,
        rows: Iterable[EncodedRow],
        planes: Collection[str],
        metadata: Mapping[str, str],
    ) -> None:
        """Write a new file at `path`, row after row; each row has exactly the planes named.

        Raises ValueError for a row with other planes; the file is then of no use.
        """

    @abstractmethod
    def open(self, path: Path) -> Shard:
        """Open a file for random access; raises `ShardCorruptError` for what is not a shard."""


def require_planes(row: EncodedRow, planes: Collection[str]) -> None:
    """Raise ValueError unless the row has exactly these planes."""
    if set(row.planes) != set(planes):
        raise ValueError(
            f"row {row.key} has planes {sorted(row.planes)}, the shard holds {sorted(planes)}"
        )


def shard_format(name: ShardFormatName) -> ShardFormat:
    """The format of that name. Imports lazily: a reader of one never loads the other's library."""
    if name == "arrow":
        from teacher_cache.arrow_shard import ArrowFormat

        return ArrowFormat()
    from teacher_cache.wds_shard import WebDatasetFormat

    return WebDatasetFormat()
