"""Rearranges a tensor's bytes so that zstd compresses them better, without loss, for any dtype.

A transform splits the bits of a tensor (unsigned integers of the same width) into blocks of bytes;
its join gives the bits back. benchmarks/cache/codec.py prints how many bytes each saves. Joins
raise `ShardCorruptError` for a payload that does not fit the shape, before they allocate; the
result is at most 8 times the payload. Joins make few passes over the values, because they run in
every epoch of every student (benchmarks/cache/reader.py).
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from teacher_cache.schema.errors import ShardCorruptError

Octets = npt.NDArray[np.uint8]
Bits = npt.NDArray[np.unsignedinteger]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """One layout: `split` gives the blocks, `join(payload, shape, width)` the flat bits.

    zstd compresses each block with its own statistics. `width` is the size of a value in bytes.
    """

    code: int
    """Its code in a frame's header."""
    split: Callable[[Bits], list[bytes]]
    join: Callable[[Octets, Shape, int], Bits]


def _split_plain(bits: Bits) -> list[bytes]:
    return [bits.tobytes()]


def _join_plain(payload: Octets, shape: Shape, width: int) -> Bits:
    _require_size(payload, math.prod(shape) * width)
    return payload.copy().view(_UNSIGNED[width])  # the copy is aligned, a frame's payload is not


def _split_byte_streams(bits: Bits) -> list[bytes]:
    """Byte 0 (the lowest) of every value, then byte 1 of every value, ...

    Parquet's BYTE_STREAM_SPLIT: exponents compress well once mantissas are apart.
    """
    width = bits.dtype.itemsize
    octets = np.ascontiguousarray(bits).reshape(-1).view(np.uint8).reshape(-1, width)
    return [octets[:, place].tobytes() for place in range(width)]


def _join_byte_streams(payload: Octets, shape: Shape, width: int) -> Bits:
    if width == 1:
        return _join_plain(payload, shape, width)
    _require_size(payload, math.prod(shape) * width)
    streams: Bits = payload.reshape(width, -1)
    while len(streams) > 1:  # two neighbours become one stream of values twice as wide
        num_bits = 8 * streams.dtype.itemsize
        joined = streams[1::2].astype(_UNSIGNED[num_bits // 4])
        joined <<= num_bits
        joined |= streams[::2]
        streams = joined
    return streams.reshape(-1)


def _split_delta_by_rank(bits: Bits) -> list[bytes]:
    """Differences between neighbouring ranks, rank by rank, as byte streams.

    A row's entries descend, so their integers ascend and the differences are small numbers of
    similar size. Differences wrap, so rows in any order (and NaNs) are restored too.
    """
    keys = _descending(bits.reshape(_rows_and_kept(bits.shape))).T
    steps = keys.copy()
    steps[1:] -= keys[:-1]
    return _split_byte_streams(steps)


def _join_delta_by_rank(payload: Octets, shape: Shape, width: int) -> Bits:
    num_rows, num_kept = _rows_and_kept(shape)
    steps = _join_byte_streams(payload, shape, width)
    if not len(steps):  # the shape may be too large for an array
        return steps
    signed = steps.view(f"<i{width}")  # torch has no arithmetic on unsigned integers
    by_rank = torch.from_numpy(signed.reshape(num_kept, num_rows))
    # torch sums over ranks and writes row by row in one pass; numpy takes four times as long.
    keys = torch.cumsum(by_rank.T, dim=1, dtype=by_rank.dtype)
    return _descending(keys.reshape(-1).numpy().view(steps.dtype))


def _split_dictionary(bits: Bits) -> list[bytes]:
    """The distinct values, ascending, as differences; then each value's index among them.

    A sample uses about a thousand vocabulary ids: an index takes two bytes, not four, and its high
    byte separates frequent regions of the vocabulary from rare ones.
    """
    entries, indices = np.unique(bits, return_inverse=True)
    steps = np.diff(entries, prepend=entries.dtype.type(0))
    codes = indices.astype(_UNSIGNED[_code_width(len(entries))])
    return [
        struct.pack("<I", len(entries)),
        *_split_byte_streams(steps),
        *_split_byte_streams(codes),
    ]


def _join_dictionary(payload: Octets, shape: Shape, width: int) -> Bits:
    if len(payload) < 4:
        raise ShardCorruptError(f"a dictionary in {len(payload)} bytes, expected at least 4")
    num_entries = int.from_bytes(payload[:4], "little")
    code_width = _code_width(num_entries)
    end = 4 + num_entries * width
    _require_size(payload, end + math.prod(shape) * code_width)
    steps = _join_byte_streams(payload[4:end], (num_entries,), width)
    codes = _join_byte_streams(payload[end:], shape, code_width)
    if len(codes) and int(codes.max()) >= num_entries:
        raise ShardCorruptError(f"index {codes.max()} in a dictionary of {num_entries} values")
    # All indices were checked above; mode "wrap" does not check them again.
    return np.cumsum(steps, dtype=steps.dtype).take(codes, mode="wrap")


def ragged_delta(num_rows: Sequence[int] | None = None) -> Transform:
    """The transform of rows of different lengths: differences between ranks, as byte streams.

    Values stand rank by rank, longest row first: the first entry of each row, then the second of
    each row that has one, ... `num_rows` has the number of values of each rank (default: all values
    are rank 0). Otherwise as `DELTA_BY_RANK`. `split` raises ValueError unless the lengths sum to
    the number of values.
    """

    def split(bits: Bits) -> list[bytes]:
        one_rank = [bits.size] if bits.size else []
        lengths = np.array(one_rank if num_rows is None else num_rows, "<u4")
        if not _are_rank_lengths(lengths, bits.size):
            raise ValueError(f"ranks of {lengths} values are no ragged_delta of {bits.size}")
        keys = _descending(bits.reshape(-1))
        steps, before = keys.copy(), 0
        for at, length in _later_ranks(lengths):
            steps[at : at + length] -= keys[before : before + length]
            before = at
        return [
            struct.pack("<I", len(lengths)),
            *_split_byte_streams(lengths),
            *_split_byte_streams(steps),
        ]

    return Transform(code=4, split=split, join=_join_ragged_delta)


def _join_ragged_delta(payload: Octets, shape: Shape, width: int) -> Bits:
    num_ranks = int.from_bytes(payload[:4], "little")
    end = 4 + 4 * num_ranks
    if len(payload) < 4 or num_ranks > MAX_RANKS:
        raise ShardCorruptError(f"{num_ranks} ranks in {len(payload)} bytes")
    _require_size(payload, end + math.prod(shape) * width)
    lengths = _join_byte_streams(payload[4:end], (num_ranks,), 4)
    keys = _join_byte_streams(payload[end:], shape, width)
    if not _are_rank_lengths(lengths, len(keys)):
        raise ShardCorruptError(f"ranks of {lengths} values are no ragged_delta of {len(keys)}")
    before = 0
    for at, length in _later_ranks(lengths):
        keys[at : at + length] += keys[before : before + length]
        before = at
    return _descending(keys)


def _are_rank_lengths(lengths: npt.NDArray[np.integer], total: int) -> bool:
    """Whether lengths are positive, do not increase, and sum to `total`."""
    signed = lengths.astype(np.int64)
    descend = bool((np.diff(signed) <= 0).all() and (signed > 0).all())
    return descend and len(signed) <= MAX_RANKS and int(signed.sum()) == total


def _later_ranks(lengths: npt.NDArray[np.integer]) -> list[tuple[int, int]]:
    """(start, number of values) of every rank but the first."""
    starts = np.cumsum(lengths[:-1], dtype=np.int64)
    return list(zip(starts.tolist(), lengths[1:].tolist(), strict=True))


def _rows_and_kept(shape: Shape) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _descending(bits: Bits) -> Bits:
    """Integers that ascend as the floats with these bits descend; its own inverse.

    Bits of negative floats ascend already; in the others all bits but the sign are flipped.
    Arithmetic, because a branch per value takes twice the time.
    """
    flips = np.right_shift(bits, 8 * bits.dtype.itemsize - 1)  # 1 where negative, else 0
    flips -= 1
    flips >>= 1  # no bit where negative, else all but the sign
    return np.bitwise_xor(bits, flips, out=flips)


def _code_width(num_entries: int) -> int:
    return 1 if num_entries <= 2**8 else 2 if num_entries <= 2**16 else 4


def _require_size(payload: Octets, expected: int) -> None:
    if len(payload) != expected:
        raise ShardCorruptError(f"a payload of {len(payload)} bytes, the shape needs {expected}")


MAX_RANKS = 2**16
"""Most ranks of a `ragged_delta`: each costs one loop iteration."""

_UNSIGNED = {width: np.dtype(f"<u{width}") for width in (1, 2, 4, 8)}

PLAIN = Transform(code=0, split=_split_plain, join=_join_plain)
BYTE_STREAM_SPLIT = Transform(code=1, split=_split_byte_streams, join=_join_byte_streams)
DELTA_BY_RANK = Transform(code=2, split=_split_delta_by_rank, join=_join_delta_by_rank)
DICTIONARY = Transform(code=3, split=_split_dictionary, join=_join_dictionary)
RAGGED_DELTA = ragged_delta()

TRANSFORMS = {
    each.code: each for each in (PLAIN, BYTE_STREAM_SPLIT, DELTA_BY_RANK, DICTIONARY, RAGGED_DELTA)
}
