"""Shards as Arrow IPC files: memory-mapped, one record batch per row, one column per plane.

Columns: key, source_id, messages (JSON), checks (JSON): string; images: list<large_binary>; and
for every plane a large_binary with one zstd frame. Nothing outside the frames is compressed and
no extension type is used, so pyarrow and zstandard alone can read a shard. One batch per row lets
the writer stream, keeps a row's pages together, and touches a plane's pages only when it is read.
"""

import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from teacher_cache.manifest import ShardCorruptError
from teacher_cache.shard_format import EncodedRow, Shard, ShardFormat, require_planes

_TEXTS = ("key", "source_id", "messages", "checks")


class ArrowFormat(ShardFormat):
    """Arrow IPC file format; see `ShardFormat`."""

    suffix = ".arrow"

    def write(
        self,
        path: Path,
        rows: Iterable[EncodedRow],
        planes: Collection[str],
        metadata: Mapping[str, str],
    ) -> None:
        """Write a new file at `path`, row after row; each row has exactly the planes named."""
        schema = _schema(sorted(planes), metadata)
        with path.open("xb") as file, pa.ipc.new_file(file, schema) as writer:
            for row in rows:
                require_planes(row, planes)
                texts = (row.key, row.source_id, row.messages, row.checks)
                frames = [row.planes[name] for name in sorted(planes)]
                columns = [[text] for text in texts] + [[list(row.images)]] + [[f] for f in frames]
                arrays = [
                    pa.array(column, field.type)
                    for column, field in zip(columns, schema, strict=True)
                ]
                writer.write_batch(pa.record_batch(arrays, schema=schema))

    def open(self, path: Path) -> "ArrowShard":
        """Map a file into memory; raises `ShardCorruptError` for what is not an Arrow file."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            stored: dict[bytes, bytes] = reader.schema.metadata or {}
            metadata = {name.decode(): value.decode() for name, value in stored.items()}
            names: list[str] = reader.schema.names
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ShardCorruptError(f"{path} is not an intact Arrow file: {error}") from error
        if not reader.schema.equals(_schema(names[len(_TEXTS) + 1 :], {})):
            raise ShardCorruptError(f"{path} is not a shard: it has columns {reader.schema}")
        return ArrowShard(path, metadata, reader)


def _schema(planes: Collection[str], metadata: Mapping[str, str]) -> Any:
    types = {name: pa.string() for name in _TEXTS}
    types["images"] = pa.list_(pa.large_binary())
    types.update((name, pa.large_binary()) for name in planes)
    fields = [pa.field(name, kind, nullable=False) for name, kind in types.items()]
    return pa.schema(fields, metadata=dict(sorted(metadata.items())))


class ArrowShard(Shard):
    """A memory-mapped Arrow file."""

    def __init__(self, path: Path, metadata: Mapping[str, str], reader: Any) -> None:
        super().__init__(path, metadata, reader.num_record_batches)
        self._reader = reader
        self._lock = threading.Lock()

    def _fetch(self, row: int, planes: Collection[str]) -> tuple[EncodedRow, str]:
        try:
            with self._lock:
                batch = self._reader.get_batch(row)
            # Damaged offsets would read outside the buffers; the check looks at offsets and texts.
            batch.validate(full=True)
        except pa.ArrowException as error:
            raise ValueError(str(error)) from error
        if batch.num_rows != 1 or any(column.null_count for column in batch.columns):
            raise ValueError(f"expected one row without nulls, found {batch.num_rows} rows")
        key, source_id, messages, checks = (batch.column(name)[0].as_py() for name in _TEXTS)
        encoded = EncodedRow(
            key=key,
            source_id=source_id,
            messages=messages,
            images=tuple(batch.column("images")[0].as_py()),
            planes={name: batch.column(name)[0].as_py() for name in planes},
        )
        return encoded, checks
