"""Defines the interface of a shard format, and the checks that all formats share.

A row is stored as its pieces plus `checks`, a JSON text with the xxh3 sum of every image and frame,
and `row`, the sum over key, source id, messages and all those sums. A flipped byte, a frame of
another row or column, or a lost column raises a `ShardCorruptError` that names file and sample.
Only what is asked for is read.

A row with `shared_from` has the images and vision columns of an earlier row of its file, its owner,
which alone stores them; the row's `checks` cover them, and `Shard.read` returns the whole row.
An owner that is absent, later, of other content, or that shares itself is refused.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from teacher_cache.codec.columns import VISION_COLUMNS
from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.shards.encoded_row import EncodedRow, StoredRow


class Shard(ABC):
    """An open shard; `read` may be called from several threads at once.

    `metadata` is what `write` was given, `num_rows` the number of rows.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str], num_rows: int) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self.num_rows = num_rows

    @abstractmethod
    def _fetch(self, row: int, columns: Collection[str]) -> StoredRow:
        """What the file stores of a row; columns that are absent are left out.

        Raises ValueError, KeyError, TypeError, OSError or RecursionError.
        """

    def read(self, row: int, columns: Collection[str]) -> EncodedRow:
        """Row `row`, complete, with the given columns only; every returned byte was checked."""
        if not 0 <= row < self.num_rows:
            raise ShardCorruptError(f"{self.path}: it has {self.num_rows} rows, none is row {row}")
        try:
            stored = self._fetch(row, columns)
            encoded = stored.row
            if stored.owner is not None:
                encoded = self._with_owner(encoded, row, stored.owner, columns)
            missing = set(columns) - encoded.frames.keys()
            if missing:
                raise ValueError(f"columns {', '.join(sorted(missing))} are missing")
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise ShardCorruptError(f"{self.path}: row {row} cannot be read: {error}") from error
        try:
            encoded.verify(stored.checks)
        except (ShardCorruptError, TypeError) as error:
            raise ShardCorruptError(
                f"{self.path}: sample {encoded.key} (row {row}): {error}"
            ) from error
        return encoded

    def _with_owner(
        self, encoded: EncodedRow, row: int, owner: int, columns: Collection[str]
    ) -> EncodedRow:
        """The row with the images and vision columns of its owner."""
        if not 0 <= owner < row:
            raise ValueError(f"it shares from row {owner}, which is not an earlier row")
        found = self._fetch(owner, VISION_COLUMNS.intersection(columns)).row
        if (found.key, found.shared_from) != (encoded.shared_from, None):
            raise ValueError(
                f"it shares from {encoded.shared_from}, but row {owner} is {found.key} and "
                f"{'has its own record' if found.shared_from is None else 'shares one itself'}"
            )
        return encoded.with_owner(found)

    @abstractmethod
    def stored_bytes(self) -> dict[str, int]:
        """Bytes of the frames of each column, and of `images`, over all rows, each counted once.

        Reads sizes only. Raises `ShardCorruptError` where they cannot be read.
        """

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all rows, in order; reads every sample but no column."""
        return tuple(self.read(row, ()).key for row in range(self.num_rows))


class ShardFormat(ABC):
    """One way to store rows in a file; equal rows give equal bytes. contract.py tests it."""

    suffix: ClassVar[str]
    """End of a shard's file name."""

    @abstractmethod
    def write(
        self,
        path: Path,
        rows: Iterable[EncodedRow],
        columns: Collection[str],
        metadata: Mapping[str, str],
    ) -> None:
        """Write a new file at `path`; each row has exactly the columns named.

        Raises ValueError for a row with other columns; the file is then unusable.
        """

    @abstractmethod
    def open(self, path: Path) -> Shard:
        """Open a file for random access; raises `ShardCorruptError` if it is not a shard."""
