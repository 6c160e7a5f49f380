"""Stores the same samples in our containers and in those of others, behind one interface.

Peers get each sample as fields of bytes (LitData and WebDataset as arrays): a JSON text, the
picture, and the plain bytes of each column's array; reading returns the arrays (`decode`). Their
settings are the best for them here: zstd level 3 where a level can be set, no encryption, no
hashes, no second copy of a remote. Ours return validated records and check every byte.

`missing` names peers that are not installed; docs/performance.md says how to install them.
"""

import importlib
import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.synthetic.cached_samples import PARTS, build_cache, tensors
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.schema.teacher_output import CachedSample

Fields = dict[str, bytes]
Arrays = dict[str, npt.NDArray[Any]]

ROWS_PER_SHARD = 32
ZSTD_LEVEL = 3
MDS_SHARD_BYTES = 1 << 26
"""Raw bytes of a shard of MDS, unless its writer is told otherwise."""


def fields(cached: CachedSample) -> Fields:
    """A sample as peers store it; bfloat16 as integers of the same bits."""
    arrays: Arrays = {}
    for name, values in tensors(cached).items():
        is_bfloat16 = values.dtype == torch.bfloat16  # which numpy lacks
        arrays[name] = (values.view(torch.int16) if is_bfloat16 else values).numpy()
    text = {
        "key": cached.sample.key,
        "source_id": cached.sample.source_id,
        "messages": [[message.role, message.text] for message in cached.sample.messages],
        "columns": {name: [array.dtype.str, array.shape] for name, array in arrays.items()},
    }
    columns = {name: array.tobytes() for name, array in arrays.items()}
    return {"text": json.dumps(text).encode(), "image": cached.sample.images[0], **columns}


def decode(row: Fields) -> Arrays:
    """The arrays of a row; they share its bytes."""
    columns = json.loads(row["text"])["columns"]
    return {
        name: np.frombuffer(row[name], dtype).reshape(shape)
        for name, (dtype, shape) in columns.items()
    }


class Container(ABC):
    """One way to store samples in shards of `ROWS_PER_SHARD`, and to read them."""

    name: str
    library: str | None = None
    """What has to be installed for it, beyond what emkd needs."""
    has_random_access = True

    @property
    def missing(self) -> str | None:
        """Why this container cannot be measured here, or None."""
        try:
            importlib.import_module(self.library or "pyarrow")
        except ImportError as error:  # of the library, or of something that it needs
            return f"{self.library} cannot be imported: {error}"
        return None

    @abstractmethod
    def write(self, folder: Path, samples: Sequence[CachedSample]) -> None:
        """Write a new folder."""

    @abstractmethod
    def open(self, folder: Path) -> Any:
        """The argument of `read` and `stream`."""

    @abstractmethod
    def read(self, opened: Any, index: int) -> object:
        """One sample."""

    def stream(self, opened: Any, num_samples: int) -> Iterator[object]:
        """All samples in order."""
        return (self.read(opened, index) for index in range(num_samples))


class Ours(Container):
    """A sealed cache."""

    def __init__(self, form: ShardFormatName, rows_per_shard: int = ROWS_PER_SHARD) -> None:
        self.name = f"emkd {'Arrow' if form == 'arrow' else 'tar'}"
        self._form: ShardFormatName = form
        self._rows_per_shard = rows_per_shard

    def write(self, folder: Path, samples: Sequence[CachedSample]) -> None:
        """Plan, shards (each read back and hashed), seal."""
        build_cache(folder, list(samples), self._rows_per_shard, self._form)

    def open(self, folder: Path) -> CacheReader:
        """A reader."""
        return CacheReader.open(folder)

    def read(self, opened: CacheReader, index: int) -> object:
        """Sample and records, checked."""
        return opened.read(index, PARTS)


def _shards(samples: Sequence[CachedSample]) -> Iterator[tuple[str, list[Fields]]]:
    for start in range(0, len(samples), ROWS_PER_SHARD):
        rows = [fields(sample) for sample in samples[start : start + ROWS_PER_SHARD]]
        yield f"{start // ROWS_PER_SHARD:05d}", rows


def _table(rows: Sequence[Fields]) -> Any:
    columns = {name: pa.array([row[name] for row in rows], pa.large_binary()) for name in rows[0]}
    return pa.table(columns)


def _first_row(batch: Any) -> Arrays:
    return decode({name: batch.column(name)[0].as_py() for name in batch.schema.names})


class _Files:
    """The files of a folder, each opened on first use: there may be thousands."""

    def __init__(self, folder: Path, open_file: Callable[[Path], Any]) -> None:
        self._paths = sorted(folder.iterdir())
        self._open_file = open_file
        self._opened: dict[int, Any] = {}

    def __getitem__(self, shard: int) -> Any:
        if shard not in self._opened:
            self._opened[shard] = self._open_file(self._paths[shard])
        return self._opened[shard]


class ArrowZstd(Container):
    """Arrow IPC with zstd buffers, one row per batch, memory-mapped."""

    name = "Arrow zstd"

    def write(self, folder: Path, samples: Sequence[CachedSample]) -> None:
        """One file per shard."""
        folder.mkdir()
        codec = pa.Codec("zstd", ZSTD_LEVEL)
        options = pa.ipc.IpcWriteOptions(compression=codec)
        for shard, rows in _shards(samples):
            table = _table(rows)
            path = str(folder / f"{shard}.arrow")
            with pa.ipc.new_file(path, table.schema, options=options) as writer:
                writer.write_table(table, max_chunksize=1)

    def open(self, folder: Path) -> Any:
        """Readers of its files."""
        return _Files(folder, lambda path: pa.ipc.open_file(pa.memory_map(str(path))))

    def read(self, opened: Any, index: int) -> object:
        """One batch."""
        shard, row = divmod(index, ROWS_PER_SHARD)
        return _first_row(opened[shard].get_batch(row))


class ParquetZstd(Container):
    """Parquet, zstd, no dictionary (every value is unique)."""

    def __init__(self, rows_per_group: int) -> None:
        self.name = f"Parquet zstd, {rows_per_group}-row groups"
        self._rows_per_group = rows_per_group

    def write(self, folder: Path, samples: Sequence[CachedSample]) -> None:
        """One file per shard."""
        folder.mkdir()
        for shard, rows in _shards(samples):
            pq.write_table(
                _table(rows),
                folder / f"{shard}.parquet",
                row_group_size=self._rows_per_group,
                compression="zstd",
                compression_level=ZSTD_LEVEL,
                use_dictionary=False,
                write_statistics=False,
            )

    def open(self, folder: Path) -> Any:
        """Readers of its files."""
        return _Files(folder, lambda path: pq.ParquetFile(path, memory_map=True))

    def read(self, opened: Any, index: int) -> object:
        """The sample's whole row group."""
        shard, row = divmod(index, ROWS_PER_SHARD)
        group, place = divmod(row, self._rows_per_group)
        table = opened[shard].read_row_group(group, use_threads=False)
        return _first_row(table.slice(place, 1))

    def stream(self, opened: Any, num_samples: int) -> Iterator[object]:
        """Each row group once."""
        for shard in range(-(-num_samples // ROWS_PER_SHARD)):
            file = opened[shard]
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, use_threads=False)
                yield from (_first_row(table.slice(row, 1)) for row in range(table.num_rows))


class WebDatasetNpy(Container):
    """Tars of .npy members, read by webdataset; it has no random access."""

    name = "WebDataset npy"
    has_random_access = False

    def write(self, folder: Path, samples: Sequence[CachedSample]) -> None:
        """One tar per shard."""
        folder.mkdir()
        for start in range(0, len(samples), ROWS_PER_SHARD):
            path = folder / f"{start // ROWS_PER_SHARD:05d}.tar"
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in samples[start : start + ROWS_PER_SHARD]:
                    self._add(tar, fields(sample))

    def _add(self, tar: tarfile.TarFile, row: Fields) -> None:
        key = json.loads(row["text"])["key"]
        arrays: dict[str, bytes] = {}
        for name, array in decode(row).items():
            np.save(buffer := io.BytesIO(), array)
            arrays[f"{name}.npy"] = buffer.getvalue()
        for name, data in {"text.json": row["text"], "0.jpg": row["image"], **arrays}.items():
            member = tarfile.TarInfo(f"{key}.{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

    def open(self, folder: Path) -> Any:
        """A pipeline over all tars."""
        from webdataset.compat import WebDataset

        urls = [str(path) for path in sorted(folder.iterdir())]
        return WebDataset(urls, shardshuffle=False, empty_check=False)

    def read(self, opened: Any, index: int) -> object:
        """The first sample only."""
        assert index == 0
        return next(self.stream(opened, 1))

    def stream(self, opened: Any, num_samples: int) -> Iterator[object]:
        """Members decoded by numpy."""
        for row in opened:
            members = {name: data for name, data in row.items() if name.endswith(".npy")}
            yield {name: np.load(io.BytesIO(data)) for name, data in members.items()}


class Mds(Container):
    """MosaicML Streaming, whole shards in zstd; the first read leaves decompressed copies."""

    name = "MDS zstd"
    library = "streaming"

    def __init__(self, shard_bytes: int | None = None) -> None:
        self._shard_bytes = shard_bytes

    def write(self, folder: Path, samples: Sequence[CachedSample]) -> None:
        """Through its writer; shards have a size in bytes, by default that of `ROWS_PER_SHARD`."""
        from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

        columns = dict.fromkeys(fields(samples[0]), "bytes")
        raw = sum(len(data) for sample in samples for data in fields(sample).values())
        with MDSWriter(
            out=str(folder),
            columns=columns,
            compression=f"zstd:{ZSTD_LEVEL}",
            size_limit=self._shard_bytes or raw * ROWS_PER_SHARD // len(samples),
        ) as writer:
            for sample in samples:
                writer.write(fields(sample))

    def open(self, folder: Path) -> Any:
        """Its dataset over the folder itself: no download, no second compressed copy."""
        from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]
        from streaming.base import util  # pyright: ignore[reportMissingImports]

        util.clean_stale_shared_memory()
        return StreamingDataset(local=str(folder), batch_size=1, shuffle=False)

    def read(self, opened: Any, index: int) -> object:
        """One sample."""
        return decode(opened[index])

    def stream(self, opened: Any, num_samples: int) -> Iterator[object]:
        """Its own iterator, which prepares shards ahead."""
        return (decode(row) for row in opened)


class LitData(Container):
    """LitData, zstd over batches (its default, here a whole chunk) or over samples."""

    library = "litdata"

    def __init__(self, level: str) -> None:
        self.name = f"LitData zstd by {level}"
        self._level = level

    def write(self, folder: Path, samples: Sequence[CachedSample]) -> None:
        """Through the writer that `litdata.optimize` runs in its workers."""
        from litdata.streaming import writer as chunks  # pyright: ignore[reportMissingImports]

        writer = chunks.BinaryWriter(
            str(folder),
            chunk_size=ROWS_PER_SHARD,
            compression="zstd",
            compression_level=self._level,
        )
        for index, sample in enumerate(samples):
            row = fields(sample)
            # As arrays: it would not compress rows that are mostly bytes.
            writer[index] = {**row, **decode(row)}
        writer.done()
        writer.merge()

    def open(self, folder: Path) -> Any:
        """Its dataset over the folder itself."""
        from litdata import StreamingDataset  # pyright: ignore[reportMissingImports]

        return StreamingDataset(str(folder))

    def read(self, opened: Any, index: int) -> object:
        """One sample; its own serializer makes the arrays."""
        return opened[index]

    def stream(self, opened: Any, num_samples: int) -> Iterator[object]:
        """Its own iterator."""
        return iter(opened)


def containers() -> list[Container]:
    """All containers, ours first."""
    ours = [Ours("arrow"), Ours("webdataset")]
    files = [ArrowZstd(), ParquetZstd(16), ParquetZstd(1), WebDatasetNpy()]
    return [*ours, *files, Mds(), LitData("batch"), LitData("sample")]
