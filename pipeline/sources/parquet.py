"""Reads samples from Parquet: images as structs of bytes, turns in any layout of turns.py.

Reads a few rows at a time, whatever the size of a row group, and only the columns in use: those of
the turns, `image` or `images`, `id`, and others that look like media, to name them. Refuses files
without turns, images stored as paths only, and both image columns at once.
"""

import bisect
import itertools
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow.parquet import ParquetFile

from pipeline.sources.conversations import build_sample, entry_id, refusing
from pipeline.sources.media import IMAGE_FIELDS, ImageRules, is_media_name
from pipeline.sources.turns import LAYOUTS, TURN_FIELDS
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.samples import Sample

ROWS_AT_ONCE = 16
"""Rows decoded at once. Arrow itself may hold the bytes of a row group while it reads one."""


class ParquetSource:
    """The rows of some .parquet files: files in the order given, rows as in the file."""

    def __init__(self, name: str, files: Sequence[Path], rules: ImageRules) -> None:
        self.name = name
        self._rules = rules
        self.unread = Counter[str]()
        self._groups: list[tuple[Path, int]] = []
        sizes: list[int] = []
        for file in files:
            with _open(file) as table:
                _check_columns(file, table.schema_arrow.names)
                for group in range(table.num_row_groups):
                    self._groups.append((file, group))
                    sizes.append(table.metadata.row_group(group).num_rows)
        self._starts = [0, *itertools.accumulate(sizes)]
        self._lock = threading.Lock()
        self._rows: tuple[int, Iterator[Any]] | None = None
        self._batch: tuple[int, Any] = (0, None)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._starts, index) - 1
        file, group = self._groups[number]
        row_number = index - self._starts[number]
        where = f"{file}, row {row_number} of row group {group}"
        source_id = f"{file.name}:{group}:{row_number}"
        with refusing(where, source_id):
            try:
                row = self._row(number, row_number)
            except (OSError, StopIteration, pa.ArrowException) as error:
                why = f"{where}: cannot be read as Parquet: {error}; copy the file again"
                raise SampleError(source_id, why) from error
            source_id = entry_id(row, source_id)
            return build_sample(where, source_id, row, self._rules, self.unread)

    def _row(self, number: int, row: int) -> dict[str, Any]:
        """One row of a row group; reading goes on from the last one, since readers go in order."""
        with self._lock:
            start, batch = self._batch
            if self._rows is None or self._rows[0] != number or row < start:
                self._rows = (number, _batches(*self._groups[number]))
                start, batch = 0, None
            rows, self._rows = self._rows, None  # a read that fails leaves nothing behind
            while batch is None or row >= start + batch.num_rows:
                start += 0 if batch is None else batch.num_rows
                batch = next(rows[1])
            self._rows, self._batch = rows, (start, batch)
            return batch.slice(row - start, 1).to_pylist()[0]


def _batches(file: Path, group: int) -> Iterator[Any]:
    """The rows of a row group, a few at a time.

    A whole group cannot be read where its images are more than 2 GiB: Arrow has no nested column of
    several chunks.
    """
    with _open(file) as table:
        names = [name for name, kind in _columns(table) if _is_read(name, kind)]
        yield from table.iter_batches(ROWS_AT_ONCE, [group], columns=names)


def _columns(table: ParquetFile) -> list[tuple[str, Any]]:
    return [(field.name, field.type) for field in table.schema_arrow]


def _is_read(name: str, kind: Any) -> bool:
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    embedded = pa.types.is_struct(kind) and any(field.name == "bytes" for field in kind)
    wanted = name in TURN_FIELDS or name in IMAGE_FIELDS or name == "id"
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return wanted or is_media_name(name) or embedded or binary


def _open(file: Path) -> ParquetFile:
    try:
        return ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file}: cannot be read as Parquet: {error}; check the path") from error


def _check_columns(file: Path, names: list[str]) -> None:
    if not set(LAYOUTS) & set(names):
        raise ValueError(
            f"{file}: found the columns {', '.join(names)}, expected one named "
            f"{', '.join(LAYOUTS)}; rename the column that holds the turns"
        )
    if set(IMAGE_FIELDS) <= set(names):
        raise ValueError(f"{file}: found both `image` and `images`, expected one; drop the other")
