"""Measures the bytes that one tier stores: a sample's encoded row, and a shard's own structure."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.fidelity.sizes import is_vision_column
from teacher_cache.codec.columns import VISION_COLUMNS, columns_of, output_columns
from teacher_cache.schema.manifest import CacheSpec, to_json
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.shards.arrow import ArrowFormat
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.shards.rows import encode_row, tier_parts


@dataclass(slots=True)
class TierBytes:
    """Sums over samples of the bytes of their rows, the shard's structure not counted."""

    layout_vision: int = 0
    """Vision columns before compression."""
    stored_vision: int = 0
    stored: int = 0
    shareable: int = 0
    """Bytes that another row may store for this one (vision_sharing.py)."""

    def add(self, cached: CachedSample, spec: CacheSpec) -> None:
        """Add one sample, encoded as a shard would hold it."""
        columns = output_columns(cached.output)
        row = encode_row(cached, spec)
        vision = [name for name in columns if is_vision_column(name)]
        images = sum(map(len, row.images))
        self.layout_vision += sum(columns[name].nbytes for name in vision)
        self.stored_vision += sum(len(row.frames[name]) for name in vision)
        self.stored += sum(map(len, row.frames.values())) + images
        self.stored += sum(len(text.encode()) for text in _texts(row))
        if row.images:
            shared = VISION_COLUMNS & row.frames.keys()
            self.shareable += sum(len(row.frames[name]) for name in shared) + images


def shard_structure(spec: CacheSpec) -> tuple[float, float]:
    """Bytes of an Arrow shard beyond its rows' content: for each row, and for the file.

    Measured on shards of one row and of nine, whose values all have one size.
    """
    columns = columns_of(tier_parts(spec), spec)
    value = bytes(100)
    row = EncodedRow(
        key="0" * 32,
        source_id="a sample",
        messages="[]",
        images=(value,),
        frames=dict.fromkeys(columns, value),
    )
    content = len("".join(_texts(row))) + len(value) * (1 + len(columns))
    sizes: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 9):
            path = Path(folder) / str(count)
            ArrowFormat().write(path, [row] * count, columns, {"emkd.spec": to_json(spec)})
            sizes[count] = path.stat().st_size - count * content
    per_row = (sizes[9] - sizes[1]) / 8
    return per_row, sizes[1] - per_row


def _texts(row: EncodedRow) -> tuple[str, ...]:
    return (row.key, row.source_id, row.messages, row.checks)
