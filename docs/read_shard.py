"""Decode and describe every column of an Arrow shard with numpy, pyarrow and zstandard alone.

    python docs/read_shard.py cache/mine/shards/00000-0123456789abcdef.arrow

Stands alone on purpose: it imports nothing of emkd, and format.md says why each line is right.
bfloat16 values become float32 (exactly). Frames' checksums are checked, `checks` are not.
"""

# ruff: noqa: T201
import itertools
import json
import math
import struct
import sys

import numpy as np
import pyarrow as pa
import zstandard

# Of dtype codes 1, 2, ...; code 2 is bfloat16, which numpy lacks.
NAMES = ("<f4", "<u2", "<f2", "<f8", "i1", "u1", "<i2", "<i4", "<i8", "?")


def plain(payload, shape, width):
    """Transform 0: the values as they are."""
    return np.frombuffer(payload, f"<u{width}", math.prod(shape))


def byte_streams(payload, shape, width):
    """Transform 1: byte 0 of all values, then byte 1 of all values, ..."""
    octets = np.frombuffer(payload, np.uint8, math.prod(shape) * width).reshape(width, -1)
    return np.ascontiguousarray(octets.T).view(f"<u{width}").reshape(-1)


def floats(keys):
    """Bits of floats from integers that ascend as the floats descend."""
    sign = keys.dtype.type(1 << (8 * keys.dtype.itemsize - 1))
    return np.where(keys & sign, keys, keys ^ (sign - 1))


def delta_by_rank(payload, shape, width):
    """Transform 2: integers that ascend as floats descend, steps rank by rank, in byte streams."""
    steps = byte_streams(payload, shape, width).reshape(shape[-1], math.prod(shape[:-1]))
    return floats(np.cumsum(steps, axis=0, dtype=steps.dtype).T.reshape(-1))


def dictionary(payload, shape, width):
    """Transform 3: how many entries, ascending entries as differences, each value's place."""
    (num_entries,) = struct.unpack_from("<I", payload)
    start = 4 + num_entries * width
    entries = np.cumsum(byte_streams(payload[4:start], (num_entries,), width), dtype=f"<u{width}")
    place_width = 1 if num_entries <= 2**8 else 2 if num_entries <= 2**16 else 4
    return entries[byte_streams(payload[start:], shape, place_width)]


def ragged_delta(payload, shape, width):
    """Transform 4: how many ranks, the length of each, steps from rank to rank in byte streams."""
    end = 4 + 4 * int.from_bytes(payload[:4], "little")
    lengths = byte_streams(payload[4:end], (end // 4 - 1,), 4).tolist()
    keys, start = byte_streams(payload[end:], shape, width).copy(), 0
    for before, length in itertools.pairwise(lengths):
        keys[start + before :][:length] += keys[start:][:length]
        start += before
    return floats(keys)


def decode_frame(frame):
    """The array in a frame."""
    content = zstandard.decompress(frame)
    dtype, transform, num_dims = content[:3]
    shape = struct.unpack_from(f"<{num_dims}I", content, 3)
    width = np.dtype(NAMES[dtype - 1]).itemsize
    join = (plain, byte_streams, delta_by_rank, dictionary, ragged_delta)[transform]
    bits = join(content[3 + 4 * num_dims :], shape, width)
    values = (bits.astype("<u4") << 16).view("<f4") if dtype == 2 else bits.view(NAMES[dtype - 1])
    return values.reshape(shape)


def read_shard(path):
    """The shard's metadata, and its complete rows: texts, image bytes, columns as arrays."""
    table = pa.ipc.open_file(pa.memory_map(path)).read_all()
    names = [field.name for field in table.schema if field.type == pa.large_binary()]
    rows = table.to_pylist()
    for row in reversed(rows):  # so that rows which others share from are decoded last
        owner = rows[row["shared_row"]] if row["shared_from"] else row
        row |= {name: decode_frame(row[name] or owner[name]) for name in names}
        row["images"] = owner["images"]
    return {key.decode(): text.decode() for key, text in table.schema.metadata.items()}, rows


if __name__ == "__main__":
    metadata, samples = read_shard(sys.argv[1])
    records = json.loads(metadata["emkd.spec"])["records"]
    print(f"shard {metadata['emkd.shard']}: {len(samples)} samples, records {records}")
    for sample in samples:
        print(f"{sample['key']} ({sample['source_id']}), {len(sample['images'])} images")
        for name, values in sample.items():
            if isinstance(values, np.ndarray):
                total = values.sum(dtype=np.float64)
                print(f"    {name:14} {values.dtype!s:8} {values.shape!s:12} sum {total:.9g}")
