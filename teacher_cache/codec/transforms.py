"""Byte layouts that zstd packs better than plain values: lossless for any bits of any dtype.

A transform turns the bits of a tensor (as unsigned integers of the same width) into blocks of
bytes, and the joined blocks back into the bits. It knows nothing of what the bits mean, only where
alike bytes can be put side by side; which plane takes which transform is in codec.py, what each
saves is printed by benchmarks/cache/codec.py. All are vectorised and refuse (`ShardCorruptError`)
a payload that does not fit the shape before they take memory; the result is at most 8 times the
payload. Dimensions as in schema.py: N rows, K kept entries.

Joins make as few passes over the values as they can: every epoch of every student pays for them.
benchmarks/cache/reader.py prints how much that is.
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
    """One layout: `split` gives the blocks, `join(payload, shape, width)` the flat bits again.

    Blocks are compressed with statistics of their own; `width` is the size of a value in bytes.
    """

    code: int
    """How a frame's header calls it."""
    split: Callable[[Bits], list[bytes]]
    join: Callable[[Octets, Shape, int], Bits]


def _split_plain(bits: Bits) -> list[bytes]:
    return [bits.tobytes()]


def _join_plain(payload: Octets, shape: Shape, width: int) -> Bits:
    _require_size(payload, math.prod(shape) * width)
    return payload.copy().view(_UNSIGNED[width])  # the copy is aligned, a frame's payload is not


def _split_planes(bits: Bits) -> list[bytes]:
    """Byte 0 (the lowest) of every value, then byte 1 of every value ...

    This is Parquet's BYTE_STREAM_SPLIT: exponents compress, mantissas do not get in their way.
    """
    width = bits.dtype.itemsize
    octets = np.ascontiguousarray(bits).reshape(-1).view(np.uint8).reshape(-1, width)
    return [octets[:, place].tobytes() for place in range(width)]


def _join_planes(payload: Octets, shape: Shape, width: int) -> Bits:
    if width == 1:
        return _join_plain(payload, shape, width)
    _require_size(payload, math.prod(shape) * width)
    planes: Bits = payload.reshape(width, -1)
    while len(planes) > 1:  # neighbours become one plane of values twice as wide
        num_bits = 8 * planes.dtype.itemsize
        joined = planes[1::2].astype(_UNSIGNED[num_bits // 4])
        joined <<= num_bits
        joined |= planes[::2]
        planes = joined
    return planes.reshape(-1)


def _split_ranks(bits: Bits) -> list[bytes]:
    """Differences from rank to rank, rank after rank, as byte planes.

    The entries of a row descend, so their integers ascend: neighbouring ranks of neighbouring
    tokens differ by small numbers of much the same size. Differences wrap, so that rows in any
    order (and NaNs) come back too.
    """
    keys = _descending(bits.reshape(_rows_and_kept(bits.shape))).T
    steps = keys.copy()
    steps[1:] -= keys[:-1]
    return _split_planes(steps)


def _join_ranks(payload: Octets, shape: Shape, width: int) -> Bits:
    num_rows, num_kept = _rows_and_kept(shape)
    steps = _join_planes(payload, shape, width)
    if not len(steps):  # its shape may be too large for an array
        return steps
    by_rank = torch.from_numpy(_signed(steps).reshape(num_kept, num_rows))
    # torch sums down the ranks and writes row by row in one pass; numpy takes four times as long.
    keys = torch.cumsum(by_rank.T, dim=1, dtype=by_rank.dtype)
    return _descending(keys.reshape(-1).numpy().view(steps.dtype))


def _split_dictionary(bits: Bits) -> list[bytes]:
    """The distinct values, ascending, as differences; then each value's place among them.

    A sample uses some thousand of the vocabulary's ids: their places take two bytes, not four,
    and the high one tells frequent regions of the vocabulary from rare ones.
    """
    entries, places = np.unique(bits, return_inverse=True)
    steps = np.diff(entries, prepend=entries.dtype.type(0))
    codes = places.astype(_UNSIGNED[_code_width(len(entries))])
    return [struct.pack("<I", len(entries)), *_split_planes(steps), *_split_planes(codes)]


def _join_dictionary(payload: Octets, shape: Shape, width: int) -> Bits:
    if len(payload) < 4:
        raise ShardCorruptError(f"a dictionary in {len(payload)} bytes")
    num_entries = int.from_bytes(payload[:4], "little")
    code_width = _code_width(num_entries)
    end = 4 + num_entries * width
    _require_size(payload, end + math.prod(shape) * code_width)
    steps = _join_planes(payload[4:end], (num_entries,), width)
    codes = _join_planes(payload[end:], shape, code_width)
    if len(codes) and int(codes.max()) >= num_entries:
        raise ShardCorruptError(f"place {codes.max()} in a dictionary of {num_entries} values")
    # All places are inside: `wrap` is the mode that does not look at each of them again.
    return np.cumsum(steps, dtype=steps.dtype).take(codes, mode="wrap")


def stairs(num_rows: Sequence[int] | None = None) -> Transform:
    """The layout of rows of different lengths: differences from rank to rank, as byte planes.

    Values stand rank by rank, the longest row first: one of each row, then one of each row that
    has a second, ...; `num_rows` says of how many, rank by rank (default: one rank). In all else
    it is `RANKS`. Its `split` raises ValueError for values that are not so many.
    """

    def split(bits: Bits) -> list[bytes]:
        one_rank = [bits.size] if bits.size else []
        lengths = np.array(one_rank if num_rows is None else num_rows, "<u4")
        if not _are_stairs(lengths, bits.size):
            raise ValueError(f"ranks of {lengths} values are no stairs of {bits.size}")
        keys = _descending(bits.reshape(-1))
        steps, before = keys.copy(), 0
        for at, length in _later_ranks(lengths):
            steps[at : at + length] -= keys[before : before + length]
            before = at
        return [struct.pack("<I", len(lengths)), *_split_planes(lengths), *_split_planes(steps)]

    return Transform(code=4, split=split, join=_join_stairs)


def _join_stairs(payload: Octets, shape: Shape, width: int) -> Bits:
    num_ranks = int.from_bytes(payload[:4], "little")
    end = 4 + 4 * num_ranks
    if len(payload) < 4 or num_ranks > MAX_STAIRS:
        raise ShardCorruptError(f"{num_ranks} ranks in {len(payload)} bytes")
    _require_size(payload, end + math.prod(shape) * width)
    lengths = _join_planes(payload[4:end], (num_ranks,), 4)
    keys = _join_planes(payload[end:], shape, width)
    if not _are_stairs(lengths, len(keys)):
        raise ShardCorruptError(f"ranks of {lengths} values are no stairs of {len(keys)}")
    before = 0
    for at, length in _later_ranks(lengths):
        keys[at : at + length] += keys[before : before + length]
        before = at
    return _descending(keys)


def _are_stairs(lengths: npt.NDArray[np.integer], total: int) -> bool:
    """Whether no rank is empty or has more values than the one before, and all have `total`."""
    signed = lengths.astype(np.int64)
    descend = bool((np.diff(signed) <= 0).all() and (signed > 0).all())
    return descend and len(signed) <= MAX_STAIRS and int(signed.sum()) == total


def _later_ranks(lengths: npt.NDArray[np.integer]) -> list[tuple[int, int]]:
    """(where it begins, how many values) of every rank but the first."""
    starts = np.cumsum(lengths[:-1], dtype=np.int64)
    return list(zip(starts.tolist(), lengths[1:].tolist(), strict=True))


def _rows_and_kept(shape: Shape) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _descending(bits: Bits) -> Bits:
    """Integers that ascend where the floats descend whose bits these are; its own inverse.

    Negative floats have the sign bit set and grow downwards already; of the others all bits but
    the sign are flipped. Arithmetic, because a choice for each value takes twice the time.
    """
    flips = np.right_shift(bits, 8 * bits.dtype.itemsize - 1)  # 1 where negative, else 0
    flips -= 1
    flips >>= 1  # now no bit where negative, else all but the sign
    return np.bitwise_xor(bits, flips, out=flips)


def _code_width(num_entries: int) -> int:
    return 1 if num_entries <= 2**8 else 2 if num_entries <= 2**16 else 4


def _signed(bits: Bits) -> npt.NDArray[np.signedinteger]:
    """The same bits for torch, which does no arithmetic on unsigned integers."""
    return bits.view(f"<i{bits.dtype.itemsize}")


def _require_size(payload: Octets, expected: int) -> None:
    if len(payload) != expected:
        raise ShardCorruptError(f"a payload of {len(payload)} bytes, its shape needs {expected}")


MAX_STAIRS = 2**16
"""Most ranks of `stairs`, each of which costs a loop."""

_UNSIGNED = {width: np.dtype(f"<u{width}") for width in (1, 2, 4, 8)}

PLAIN = Transform(code=0, split=_split_plain, join=_join_plain)
PLANES = Transform(code=1, split=_split_planes, join=_join_planes)
RANKS = Transform(code=2, split=_split_ranks, join=_join_ranks)
DICTIONARY = Transform(code=3, split=_split_dictionary, join=_join_dictionary)
STAIRS = stairs()

TRANSFORMS = {each.code: each for each in (PLAIN, PLANES, RANKS, DICTIONARY, STAIRS)}
