"""A cached sample as an encoded row, and back: the one place where content meets its bytes.

Promises: what is decoded equals what was encoded, to the bit, and the sample's content has been
checked against its key; whatever does not add up is a `ShardCorruptError`. Parts not asked for
are not decompressed.
"""

import json
from collections.abc import Collection

from teacher_cache.codec import (
    TIER_PARTS,
    Part,
    encode_plane,
    output_from_planes,
    output_planes,
    parts_in,
    planes_of,
)
from teacher_cache.frames import decode_frame
from teacher_cache.manifest import CacheSpec, ShardCorruptError
from teacher_cache.schema import CachedSample, Message, Sample, TopKRecord, sample_key
from teacher_cache.shard_format import EncodedRow, Shard


def encode_row(cached: CachedSample, spec: CacheSpec) -> EncodedRow:
    """Encode one sample; ValueError where its records are not those that the spec promises."""
    sample, output = cached.sample, cached.output
    _require_tier(cached, spec)
    turns = [{"role": message.role, "text": message.text} for message in sample.messages]
    return EncodedRow(
        key=sample.key,
        source_id=sample.source_id,
        messages=json.dumps(turns),
        images=sample.images,
        planes={name: encode_plane(name, values) for name, values in output_planes(output).items()},
    )


def decode_row(row: EncodedRow, spec: CacheSpec) -> CachedSample:
    """Decode a row with the planes it was read with; raises `ShardCorruptError`."""
    try:
        turns = json.loads(row.messages)
        messages = tuple(Message(role=turn["role"], text=turn["text"]) for turn in turns)
        if sample_key(row.images, messages) != content_key(row.key):
            raise ShardCorruptError("images and messages are not those that the key names")
        sample = Sample(key=row.key, source_id=row.source_id, images=row.images, messages=messages)
        planes = {name: decode_frame(frame) for name, frame in row.planes.items()}
        return CachedSample(sample=sample, output=output_from_planes(planes, spec.vocab_size))
    except (ValueError, KeyError, TypeError) as error:
        raise ShardCorruptError(f"sample {row.key}: {error}") from error


def read_sample(
    shard: Shard, row: int, key: str, parts: Collection[Part], spec: CacheSpec
) -> CachedSample:
    """Read and decode one row of a shard, which must be the sample `key` of the plan.

    Raises `ShardCorruptError` naming file and sample.
    """
    encoded = shard.read(row, planes_of(parts))
    try:
        if encoded.key != key:
            raise ShardCorruptError(f"row {row} holds sample {encoded.key}, the plan has {key}")
        return decode_row(encoded, spec)
    except ShardCorruptError as error:
        raise ShardCorruptError(f"{shard.path}: {error}") from error


def content_key(key: str) -> str:
    """The content digest in a key: repeated samples carry -1, -2, ... after it."""
    return key.split("-")[0]


def tier_parts(spec: CacheSpec) -> frozenset[Part]:
    """The parts that every row of a cache holds."""
    return TIER_PARTS[spec.records]


def require_parts(parts: Collection[Part], spec: CacheSpec) -> None:
    """Raise ValueError for parts that a cache does not hold."""
    missing = set(parts) - tier_parts(spec)
    if missing:
        raise ValueError(
            f"the cache holds {', '.join(sorted(tier_parts(spec)))} (records {spec.records}), "
            f"asked for {', '.join(sorted(missing))}; build a cache with other records"
        )


def _require_tier(cached: CachedSample, spec: CacheSpec) -> None:
    found, wanted = parts_in(cached.output), tier_parts(spec)
    if found != wanted:
        raise ValueError(
            f"sample {cached.sample.key}: the teacher gave {sorted(found)}, "
            f"a cache of {spec.records} holds {sorted(wanted)}"
        )
    for record in (cached.output.vision, cached.output.response):
        if isinstance(record, TopKRecord) and record.vocab_size != spec.vocab_size:
            raise ValueError(
                f"sample {cached.sample.key}: records over {record.vocab_size} vocabulary rows, "
                f"the cache is over {spec.vocab_size}"
            )
