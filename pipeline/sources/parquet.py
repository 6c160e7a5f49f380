"""Reads samples from Parquet in the hub's layout: images as structs, turns as lists of structs.

Reads one row group at a time, and only the columns in use: `image` (one struct of bytes and path)
or `images` (a list of them), `conversations` or `messages`, and optionally `id`. Refuses files
without a column of turns, images stored as paths only, and both image columns at once.
"""

import bisect
import itertools
import threading
from pathlib import Path
from typing import Any

from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile

from pipeline.sources.conversations import TURN_COLUMNS, build_sample, entry_id
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.samples import Sample

IMAGE_COLUMNS = ("image", "images")


class ParquetSource:
    """A .parquet file, the .parquet files of a folder, or those of a pattern (train-*.parquet).

    Files are ordered by name, rows as in the file.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._groups: list[tuple[Path, int]] = []
        sizes: list[int] = []
        for file in _files(path):
            with _open(file) as table:
                _check_columns(file, table.schema_arrow.names)
                for group in range(table.num_row_groups):
                    self._groups.append((file, group))
                    sizes.append(table.metadata.row_group(group).num_rows)
        self._starts = [0, *itertools.accumulate(sizes)]
        self._lock = threading.Lock()
        self._loaded: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._starts, index) - 1
        file, group = self._groups[number]
        row_number = index - self._starts[number]
        row: dict[str, Any] = self._group(number).slice(row_number, 1).to_pylist()[0]
        where = f"{file}, row {row_number} of row group {group}"
        source_id = entry_id(row, f"{file.name}:{group}:{row_number}")
        images = [_bytes(image, where, source_id) for image in _images(row)]
        return build_sample(where, source_id, images, row)

    def _group(self, number: int) -> Any:
        """The table of one row group; the last one is kept, since most readers go in order."""
        with self._lock:
            if self._loaded is None or self._loaded[0] != number:
                file, group = self._groups[number]
                with _open(file) as table:
                    wanted = {*TURN_COLUMNS, *IMAGE_COLUMNS, "id"}
                    names = [name for name in table.schema_arrow.names if name in wanted]
                    self._loaded = (number, table.read_row_group(group, columns=names))
            return self._loaded[1]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
    elif "*" in path.name:
        files = sorted(path.parent.glob(path.name))
    else:
        files = [path]
    if not files:
        raise ValueError(f"{path}: found no .parquet file; check the path")
    return files


def _open(file: Path) -> ParquetFile:
    try:
        return ParquetFile(file)
    except (OSError, ArrowException) as error:
        raise ValueError(f"{file}: cannot be read as Parquet: {error}; check the path") from error


def _check_columns(file: Path, names: list[str]) -> None:
    if not set(TURN_COLUMNS) & set(names):
        raise ValueError(
            f"{file}: found the columns {', '.join(names)}, expected one named "
            f"{' or '.join(TURN_COLUMNS)}; rename the column that holds the turns"
        )
    if set(IMAGE_COLUMNS) <= set(names):
        raise ValueError(f"{file}: found both `image` and `images`, expected one; drop the other")


def _images(row: dict[str, Any]) -> list[Any]:
    if row.get("image") is not None:
        return [row["image"]]
    return row.get("images") or []


def _bytes(image: Any, where: str, source_id: str) -> bytes:
    data = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(data, bytes):
        return data
    raise SampleError(
        source_id,
        f"{where}: an image must be a struct with `bytes`, found {str(image)[:80]}; embed the "
        "image files when writing the Parquet file",
    )
