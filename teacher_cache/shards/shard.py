"""What the two shard formats have in common: encoded rows, their checks, and one interface.

A row is stored as its parts plus `checks`, a JSON text that binds them together: the xxh3 sums of
every image and frame, and `row`, the sum over key, source id, messages and all those sums. So a
flipped byte, a frame of another row or another plane, a lost plane: each is a `ShardCorruptError`
that names file and sample before a number is returned, and only what is asked for is read.

A row with `shared_from` has the images and vision planes of an earlier row of its file, its owner:
they are stored there alone, `checks` speak of them as of the row's own, and what `Shard.read`
returns is complete. An owner that is absent, later, another's guest or of other content is refused.
"""

import dataclasses
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import xxhash

from teacher_cache.codec.columns import VISION_PLANES
from teacher_cache.schema.manifest import ShardCorruptError
from teacher_cache.schema.options import ShardFormatName

KEY_PATTERN = re.compile(r"[0-9a-f]{32}(-[1-9][0-9]*)?")
"""A content digest; samples that repeat another one's content are numbered from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    """One row as bytes: `messages` is JSON, `planes` maps plane names to zstd frames.

    Complete, whether or not its images and vision planes are those of the row `shared_from`.
    """

    key: str
    source_id: str
    messages: str
    images: tuple[bytes, ...]
    planes: Mapping[str, bytes]
    shared_from: str | None = None

    def __post_init__(self) -> None:
        for key in (self.key, self.shared_from):
            if key is not None and not KEY_PATTERN.fullmatch(key):
                raise ValueError(f"row key {key!r} is not a sample key (32 hex digits, -n)")

    @property
    def own(self) -> "EncodedRow":
        """The row without what another one stores for it."""
        if self.shared_from is None:
            return self
        planes = {name: frame for name, frame in self.planes.items() if name not in VISION_PLANES}
        return dataclasses.replace(self, images=(), planes=planes)

    def completed(self, owner: "EncodedRow") -> "EncodedRow":
        """The row with the images of its owner, and with those vision planes that `owner` has."""
        if self.images or not VISION_PLANES.isdisjoint(self.planes):
            raise ValueError(f"it has a vision record beside that of {self.shared_from}")
        shared = {name: owner.planes[name] for name in VISION_PLANES & owner.planes.keys()}
        return dataclasses.replace(self, images=owner.images, planes={**self.planes, **shared})

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
        except (ValueError, KeyError, TypeError, RecursionError):  # the last: JSON in JSON in JSON
            intact, images, planes = False, [], {}
        if not intact:
            raise ShardCorruptError("its key, id, messages or checks are damaged")
        if images != [_sum(image) for image in self.images]:
            raise ShardCorruptError("its images are damaged")
        damaged = [name for name, frame in self.planes.items() if planes.get(name) != _sum(frame)]
        if damaged:
            raise ShardCorruptError(f"its planes {', '.join(sorted(damaged))} are damaged")

    @property
    def vision_sums(self) -> tuple[str, ...]:
        """Sums of the images and of the vision planes: equal in rows that share them."""
        shared = sorted(VISION_PLANES & self.planes.keys())
        return (
            *(_sum(image) for image in self.images),
            *(f"{name} {_sum(self.planes[name])}" for name in shared),
        )

    def _sum(self, images: list[str], planes: dict[str, str]) -> str:
        texts = [self.key, self.source_id, self.shared_from, self.messages]
        return _sum(json.dumps([*texts, images, sorted(planes.items())]).encode())


def _sum(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRow:
    """What is in a file of a row: its own pieces, its checks, the number of the row it shares from.

    A row that shares has neither images nor vision planes here.
    """

    row: EncodedRow
    checks: str
    owner: int | None

    def __post_init__(self) -> None:
        if (self.owner is None) != (self.row.shared_from is None):
            raise ValueError(f"it shares from {self.row.shared_from}, row {self.owner}")


class Shard(ABC):
    """An open shard; `read` may be called from several threads at once.

    `metadata` is what `write` was given, `num_rows` the number of rows.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str], num_rows: int) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self.num_rows = num_rows

    @abstractmethod
    def _fetch(self, row: int, planes: Collection[str]) -> StoredRow:
        """What is stored of a row; planes that are not there are left out.

        Raises ValueError, KeyError, TypeError, OSError or RecursionError.
        """

    def read(self, row: int, planes: Collection[str]) -> EncodedRow:
        """Row `row`, complete, with the given planes only; every byte returned has been checked."""
        if not 0 <= row < self.num_rows:
            raise ShardCorruptError(f"{self.path}: it has {self.num_rows} rows, none is row {row}")
        try:
            stored = self._fetch(row, planes)
            encoded = stored.row
            if stored.owner is not None:
                encoded = self._completed(encoded, row, stored.owner, planes)
            missing = set(planes) - encoded.planes.keys()
            if missing:
                raise ValueError(f"planes {', '.join(sorted(missing))} are missing")
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise ShardCorruptError(f"{self.path}: row {row} cannot be read: {error}") from error
        try:
            encoded.verify(stored.checks)
        except (ShardCorruptError, TypeError) as error:
            raise ShardCorruptError(
                f"{self.path}: sample {encoded.key} (row {row}): {error}"
            ) from error
        return encoded

    def _completed(
        self, encoded: EncodedRow, row: int, owner: int, planes: Collection[str]
    ) -> EncodedRow:
        """The row with what its owner stores for it."""
        if not 0 <= owner < row:
            raise ValueError(f"it shares from row {owner}, which is no earlier one")
        found = self._fetch(owner, VISION_PLANES.intersection(planes)).row
        if (found.key, found.shared_from) != (encoded.shared_from, None):
            raise ValueError(
                f"it shares from {encoded.shared_from}, but row {owner} is {found.key} and "
                f"{'has its own record' if found.shared_from is None else 'shares one itself'}"
            )
        return encoded.completed(found)

    @abstractmethod
    def stored_bytes(self) -> dict[str, int]:
        """Bytes of the frames of each plane, and of `images`, over all rows, each counted once.

        Looks at sizes, not at the frames. Raises `ShardCorruptError` for what cannot be looked at.
        """

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


def stored_rows(rows: Iterable[EncodedRow], planes: Collection[str]) -> Iterator[StoredRow]:
    """What is to be written of each row, whose owner must have come before it.

    Raises ValueError for a row with other planes, and for one that does not have its owner's
    images and vision planes.
    """
    owners: dict[str, tuple[int, tuple[str, ...]]] = {}
    for number, row in enumerate(rows):
        if set(row.planes) != set(planes):
            raise ValueError(
                f"row {row.key} has planes {sorted(row.planes)}, the shard holds {sorted(planes)}"
            )
        owner: int | None = None
        if row.shared_from is None:
            owners[row.key] = (number, row.vision_sums)
        else:
            owner, sums = owners.get(row.shared_from, (None, None))
            if sums != row.vision_sums:
                raise ValueError(
                    f"row {row.key} shares the vision record of {row.shared_from}, which is no "
                    "earlier row with the same images and vision planes"
                )
        yield StoredRow(row=row.own, checks=row.checks, owner=owner)


def shard_format(name: ShardFormatName) -> ShardFormat:
    """The format of that name. Imports lazily: a reader of one never loads the other's library."""
    if name == "arrow":
        from teacher_cache.shards.arrow import ArrowFormat

        return ArrowFormat()
    from teacher_cache.shards.webdataset import WebDatasetFormat

    return WebDatasetFormat()
