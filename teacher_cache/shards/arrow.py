"""Stores shards as Arrow IPC files: memory-mapped, one record batch per row.

Columns: key, source_id, messages (JSON), checks (JSON), shared_from: string; shared_row: int32;
images: list<large_binary>; one large_binary per record column, holding one zstd frame. Only frames
are compressed and no extension type is used, so pyarrow and zstandard alone can read a shard. One
batch per row lets the writer stream and the reader touch only the pages of what it reads. A row
that shares a vision record has empty images and vision columns; `shared_from` and `shared_row` name
the row that stores them.
"""

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.shards.arrow_layout import BatchBlock, batch_blocks, require_plain
from teacher_cache.shards.encoded_row import EncodedRow, StoredRow, stored_rows
from teacher_cache.shards.shard import Shard, ShardFormat

_TEXTS = ("key", "source_id", "messages", "checks", "shared_from")
_NO_ROW = -1


class ArrowFormat(ShardFormat):
    """Arrow IPC file format; see `ShardFormat`."""

    suffix = ".arrow"

    def write(
        self,
        path: Path,
        rows: Iterable[EncodedRow],
        columns: Collection[str],
        metadata: Mapping[str, str],
    ) -> None:
        """Write a new file at `path`; each row has exactly the columns named."""
        schema = _schema(sorted(columns), metadata)
        with path.open("xb") as file, pa.ipc.new_file(file, schema) as writer:
            for stored in stored_rows(rows, columns):
                row, owner = stored.row, _NO_ROW if stored.owner is None else stored.owner
                texts = (row.key, row.source_id, row.messages, stored.checks, row.shared_from or "")
                frames = [row.frames.get(name, b"") for name in sorted(columns)]
                values = [*texts, owner, list(row.images), *frames]
                pairs = zip(values, schema, strict=True)
                arrays = [pa.array([value], field.type) for value, field in pairs]
                writer.write_batch(pa.record_batch(arrays, schema=schema))

    def open(self, path: Path) -> "ArrowShard":
        """Map a file into memory; raises `ShardCorruptError` if it is not an intact Arrow file."""
        try:
            data = pa.memory_map(str(path)).read_buffer()
            octets = memoryview(data).cast("B")
            blocks = batch_blocks(octets)
            reader = pa.ipc.open_file(data)
            stored: dict[bytes, bytes] = reader.schema.metadata or {}
            metadata = {name.decode(): value.decode() for name, value in stored.items()}
            names: list[str] = reader.schema.names
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ShardCorruptError(f"{path} is not an intact Arrow file: {error}") from error
        if not reader.schema.equals(_schema(names[len(_TEXTS) + 2 :], {})):
            raise ShardCorruptError(f"{path} is not a shard: it has columns {reader.schema}")
        if reader.num_record_batches != len(blocks):
            raise ShardCorruptError(
                f"{path}: its footer lists {len(blocks)} batches, "
                f"pyarrow finds {reader.num_record_batches}"
            )
        return ArrowShard(path, metadata, reader, octets, blocks)


def _schema(columns: Collection[str], metadata: Mapping[str, str]) -> Any:
    types = {name: pa.string() for name in _TEXTS}
    types["shared_row"] = pa.int32()
    types["images"] = pa.list_(pa.large_binary())
    types.update((name, pa.large_binary()) for name in columns)
    fields = [pa.field(name, kind, nullable=False) for name, kind in types.items()]
    return pa.schema(fields, metadata=dict(sorted(metadata.items())))


class ArrowShard(Shard):
    """A memory-mapped Arrow file."""

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, str],
        reader: Any,
        data: memoryview,
        blocks: Sequence[BatchBlock],
    ) -> None:
        super().__init__(path, metadata, len(blocks))
        self._reader, self._data, self._blocks = reader, data, blocks
        self._lock = threading.Lock()

    def _batch(self, row: int) -> Any:
        require_plain(self._data, self._blocks[row])
        try:
            with self._lock:
                batch = self._reader.get_batch(row)
            # Damaged offsets would read outside the buffers; validate checks offsets and texts.
            batch.validate(full=True)
        except pa.ArrowException as error:
            raise ValueError(str(error)) from error
        if batch.num_rows != 1:
            raise ValueError(f"expected one row, found {batch.num_rows}")
        return batch

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of the frames of each column, and of `images`; reads only offsets."""
        names: list[str] = self._reader.schema.names[len(_TEXTS) + 2 :]
        found = dict.fromkeys(("images", *names), 0)
        for row in range(self.num_rows):
            try:
                batch = self._batch(row)
            except (ValueError, OSError) as error:
                raise ShardCorruptError(f"{self.path}: row {row}: {error}") from error
            for name in names:
                found[name] += batch.column(name)[0].as_buffer().size
            images = batch.column("images").flatten()
            found["images"] += sum(image.as_buffer().size for image in images)
        return found

    def _fetch(self, row: int, columns: Collection[str]) -> StoredRow:
        names = [*_TEXTS, "shared_row", "images", *columns]
        (stored,) = self._batch(row).select(names).to_pylist()  # in one call: half the time
        if None in stored.values():
            raise ValueError("expected values, found nulls")
        encoded = EncodedRow(
            key=stored["key"],
            source_id=stored["source_id"],
            messages=stored["messages"],
            images=tuple(stored["images"]),
            frames={name: stored[name] for name in columns if stored[name]},
            shared_from=stored["shared_from"] or None,
        )
        owner = None if stored["shared_row"] == _NO_ROW else stored["shared_row"]
        return StoredRow(row=encoded, checks=stored["checks"], owner=owner)
