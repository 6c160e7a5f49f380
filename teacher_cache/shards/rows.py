"""Encodes a cached sample to a row of bytes, and decodes it.

Promises: a decoded sample equals the encoded one to the bit. With lossy codecs it is within the
error bounds of the spec, or the writer refuses it (codec/error_bounds.py). The content of a sample
is checked against its key; any disagreement is a `ShardCorruptError`. Parts not asked for stay
compressed.
"""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from teacher_cache.codec.columns import (
    TIER_PARTS,
    VISION_COLUMNS,
    Part,
    columns_of,
    encode_columns,
    output_columns,
    output_from_columns,
    parts_in,
    top_k_records,
)
from teacher_cache.codec.error_bounds import require_within_bounds
from teacher_cache.codec.frames import decode_frame
from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.schema.manifest import CacheSpec
from teacher_cache.schema.options import Piece, holds
from teacher_cache.schema.samples import Message, Sample, sample_key
from teacher_cache.schema.teacher_output import CachedSample, TeacherOutput
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.shards.shard import Shard


def encode_rows(cached: Sequence[CachedSample], spec: CacheSpec) -> Iterator[EncodedRow]:
    """Encode the samples of a shard in order; computes each column once, a shared frame once.

    Raises ValueError as `encode_row` does, and where a sample shares a vision record that is not
    the record of an earlier sample.
    """
    shared = {each.output.shared_from for each in cached}
    owners: dict[str | None, tuple[dict[str, Tensor], EncodedRow]] = {}
    for each in cached:
        columns = _checked_columns(each, spec)
        vision = {name: columns[name] for name in VISION_COLUMNS & columns.keys()}
        ready: dict[str, bytes] = {}
        if each.output.shared_from is not None:
            theirs, row = owners.get(each.output.shared_from, ({}, None))
            if row is None or not all(torch.equal(vision[name], theirs[name]) for name in vision):
                raise ValueError(
                    f"sample {each.sample.key} shares the vision record of "
                    f"{each.output.shared_from}, which is no earlier sample with that record"
                )
            ready = {name: row.frames[name] for name in vision}
        row = _encoded(each, columns, ready)
        if row.shared_from is None and row.key in shared:
            owners[row.key] = (vision, row)
        yield row


def encode_row(cached: CachedSample, spec: CacheSpec) -> EncodedRow:
    """Encode one sample; ValueError where its records are not those that the spec promises."""
    return _encoded(cached, _checked_columns(cached, spec), {})


def _checked_columns(cached: CachedSample, spec: CacheSpec) -> dict[str, Tensor]:
    """The columns of a sample, whose records are of the spec's tier and within its bounds."""
    for misfit in _misfits(cached.output, spec):
        raise ValueError(f"sample {cached.sample.key}: {misfit}")
    columns = output_columns(cached.output, spec)
    sample = f"{cached.sample.key} ({cached.sample.source_id})"
    require_within_bounds(sample, cached.output, columns, spec)
    return columns


def _encoded(
    cached: CachedSample, columns: Mapping[str, Tensor], ready: Mapping[str, bytes]
) -> EncodedRow:
    """The row of a sample; `ready` has the frames of columns that were encoded before."""
    sample = cached.sample
    messages = [
        {"role": m.role, "text": m.text} | ({} if m.learn else {"learn": False})
        for m in sample.messages
    ]
    return EncodedRow(
        key=sample.key,
        source_id=sample.source_id,
        messages=json.dumps(messages),
        images=sample.images,
        frames={**ready, **encode_columns(columns, ready)},
        shared_from=cached.output.shared_from,
    )


def decode_row(row: EncodedRow, spec: CacheSpec) -> CachedSample:
    """Decode a row with the columns it was read with; raises `ShardCorruptError`."""
    return from_columns(row, stored_columns(row), spec)


def stored_columns(row: EncodedRow) -> dict[str, Tensor]:
    """The columns of a row as they are stored; raises `ShardCorruptError`."""
    try:
        return {name: decode_frame(frame) for name, frame in row.frames.items()}
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise ShardCorruptError(f"sample {row.key}: {error}") from error


def from_columns(row: EncodedRow, columns: Mapping[str, Tensor], spec: CacheSpec) -> CachedSample:
    """The sample of a row with these columns; raises `ShardCorruptError`."""
    try:
        turns = json.loads(row.messages)
        messages = tuple(
            Message(role=t["role"], text=t["text"], learn=t.get("learn", True)) for t in turns
        )
        if sample_key(row.images, messages) != content_key(row.key):
            raise ShardCorruptError("images and messages are not those that the key names")
        sample = Sample(key=row.key, source_id=row.source_id, images=row.images, messages=messages)
        output = output_from_columns(columns, spec.vocab_size, spec.top_k, spec.ratios)
        if row.shared_from is not None:
            output = dataclasses.replace(output, shared_from=row.shared_from)
        return CachedSample(sample=sample, output=output)
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        # The last two: columns of shapes that do not go together, JSON that is nested too deep.
        raise ShardCorruptError(f"sample {row.key}: {error}") from error


def read_sample(
    shard: Shard, row: int, key: str, parts: Collection[Part], spec: CacheSpec
) -> CachedSample:
    """Read and decode one row of a shard, which must be the sample `key` of the plan.

    Raises `ShardCorruptError` naming file and sample.
    """
    encoded = shard.read(row, columns_of(parts, spec))
    try:
        require_key(encoded, row, key)
        return decode_row(encoded, spec)
    except ShardCorruptError as error:
        raise ShardCorruptError(f"{shard.path}: {error}") from error


def require_key(row: EncodedRow, number: int, key: str) -> None:
    """Raise `ShardCorruptError` unless the row is the sample `key` of the plan."""
    if row.key != key:
        raise ShardCorruptError(f"row {number} holds sample {row.key}, the plan has {key}")


def content_key(key: str) -> str:
    """The content digest in a key: repeated samples carry -1, -2, ... after it."""
    return key.split("-")[0]


def tier_parts(spec: CacheSpec) -> frozenset[Part]:
    """The parts that every row of a cache holds."""
    of_grids: dict[Piece, Part] = {"topk": "response_grid", "hidden": "hidden_grid"}
    grids: set[Part] = {part for piece, part in of_grids.items() if holds(spec.records, piece)}
    return TIER_PARTS[spec.records] | (grids if spec.grid else set())


def require_parts(parts: Collection[Part], spec: CacheSpec) -> None:
    """Raise ValueError for parts that a cache does not hold."""
    missing = set(parts) - tier_parts(spec)
    if missing:
        raise ValueError(
            f"the cache holds {', '.join(sorted(tier_parts(spec)))} (records {spec.records}), "
            f"asked for {', '.join(sorted(missing))}; build a cache with other records"
        )


def _misfits(output: TeacherOutput, spec: CacheSpec) -> Iterator[str]:
    """What differs between the records of an output and those that the spec promises."""
    found, wanted = parts_in(output), tier_parts(spec)
    if found != wanted:
        yield f"the teacher gave {sorted(found)}, a cache of {spec.records} holds {sorted(wanted)}"
    for grid in (output.response_grid, output.hidden_grid):
        if grid is not None and tuple(sorted(grid)) != spec.ratios:
            yield f"the teacher gave ratios {sorted(grid)}, the cache has {spec.ratios}"
    for record in top_k_records(output).values():
        if record.vocab_size != spec.vocab_size:
            yield (
                f"records over {record.vocab_size} vocabulary rows, the cache is over "
                f"{spec.vocab_size}"
            )
        if (record.num_kept is None) != (spec.top_p is None):
            kept = "all K" if record.num_kept is None else "different numbers of"
            yield f"positions keep {kept} entries, the cache has top_p {spec.top_p}"
        elif record.num_kept is not None and spec.top_k is not None and len(record.num_kept):
            most = int(record.num_kept.max())
            if most > spec.top_k:
                yield f"a position keeps {most} entries, the cache has top_k {spec.top_k}"
