"""Byte layouts that zstd packs better than plain values: lossless for any bits of any dtype.

A transform turns the bits of a tensor (as unsigned integers of the same width) into blocks of
bytes, and the joined blocks back into the bits. It knows nothing of what the bits mean, only where
alike bytes can be put side by side; which plane takes which transform is in codec.py, what each
saves is printed by benchmarks/codec.py. All are vectorised, and all refuse (`ShardCorruptError`)
a payload that does not fit the shape before they take memory; the result is at most 8 times the
payload. Dimensions as in schema.py: N rows, K kept entries.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from teacher_cache.manifest import ShardCorruptError

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
    join: Callable[[memoryview, Shape, int], Bits]


def _split_plain(bits: Bits) -> list[bytes]:
    return [bits.tobytes()]


def _join_plain(payload: memoryview, shape: Shape, width: int) -> Bits:
    _require_size(payload, math.prod(shape) * width)
    return np.frombuffer(payload, _unsigned(width)).copy()


def _split_planes(bits: Bits) -> list[bytes]:
    """Byte 0 (the lowest) of every value, then byte 1 of every value ...

    This is Parquet's BYTE_STREAM_SPLIT: exponents compress, mantissas do not get in their way.
    """
    width = bits.dtype.itemsize
    octets = np.ascontiguousarray(bits).reshape(-1).view(np.uint8).reshape(-1, width)
    return [octets[:, place].tobytes() for place in range(width)]


def _join_planes(payload: memoryview, shape: Shape, width: int) -> Bits:
    count = math.prod(shape)
    _require_size(payload, count * width)
    planes = np.frombuffer(payload, np.uint8).reshape(width, count)
    bits = planes[0].astype(_unsigned(width))
    for place in range(1, width):
        bits |= planes[place].astype(bits.dtype) << bits.dtype.type(8 * place)
    return bits


def _split_ranks(bits: Bits) -> list[bytes]:
    """Differences from rank to rank, rank after rank, as byte planes.

    The entries of a row descend; so do their order-preserving integers, and neighbouring ranks of
    neighbouring tokens differ by small numbers of much the same size. Differences wrap, so that
    rows in any order (and NaNs) come back too.
    """
    num_rows, num_kept = _rows_and_kept(bits.shape)
    keys = _ordered(bits.reshape(num_rows, num_kept)).T
    steps = keys.copy()
    np.subtract(keys[:-1], keys[1:], out=steps[1:])
    return _split_planes(steps)


def _join_ranks(payload: memoryview, shape: Shape, width: int) -> Bits:
    num_rows, num_kept = _rows_and_kept(shape)
    steps = _join_planes(payload, shape, width)
    if not len(steps):  # its shape may be too large for numpy
        return steps
    keys = np.subtract.accumulate(steps.reshape(num_kept, num_rows), axis=0)
    return _unordered(keys.T.reshape(-1))


def _split_dictionary(bits: Bits) -> list[bytes]:
    """The distinct values, ascending, as differences; then each value's place among them.

    A sample uses some thousand of the vocabulary's ids: their places take two bytes, not four,
    and the high one tells frequent regions of the vocabulary from rare ones.
    """
    entries, places = np.unique(bits, return_inverse=True)
    steps = np.diff(entries, prepend=entries.dtype.type(0))
    codes = places.astype(_code_type(len(entries)))
    return [struct.pack("<I", len(entries)), *_split_planes(steps), *_split_planes(codes)]


def _join_dictionary(payload: memoryview, shape: Shape, width: int) -> Bits:
    if len(payload) < 4:
        raise ShardCorruptError(f"a dictionary in {len(payload)} bytes")
    num_entries: int = struct.unpack_from("<I", payload)[0]
    num_codes, code_width = math.prod(shape), _code_type(num_entries).itemsize
    end = 4 + num_entries * width
    _require_size(payload, end + num_codes * code_width)
    steps = _join_planes(payload[4:end], (num_entries,), width)
    entries = np.cumsum(steps, dtype=steps.dtype)
    codes = _join_planes(payload[end:], (num_codes,), code_width)
    if num_codes and int(codes.max()) >= num_entries:
        raise ShardCorruptError(f"place {codes.max()} in a dictionary of {num_entries} values")
    return entries.take(codes)


def _rows_and_kept(shape: Shape) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _ordered(bits: Bits) -> Bits:
    """Integers in the order of the floats whose bits these are (-0.0 just below 0.0).

    Negative floats have the sign bit set and grow downwards: all their bits are flipped, of the
    others the sign bit alone. Arithmetic, because a choice per value takes twice the time.
    """
    one, shift, sign = _sign_bit(bits)
    is_positive = (bits >> shift) ^ one
    return bits ^ ((is_positive - one) | sign)


def _unordered(keys: Bits) -> Bits:
    """The inverse of `_ordered`."""
    one, shift, sign = _sign_bit(keys)
    was_positive = keys >> shift
    return keys ^ ((was_positive - one) | sign)


def _sign_bit(bits: Bits) -> tuple[np.unsignedinteger, np.unsignedinteger, np.unsignedinteger]:
    one = bits.dtype.type(1)
    shift = bits.dtype.type(8 * bits.dtype.itemsize - 1)
    return one, shift, one << shift


def _code_type(num_entries: int) -> np.dtype[np.unsignedinteger]:
    return _unsigned(1 if num_entries <= 2**8 else 2 if num_entries <= 2**16 else 4)


def _unsigned(width: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype(f"<u{width}")


def _require_size(payload: memoryview, expected: int) -> None:
    if len(payload) != expected:
        raise ShardCorruptError(f"a payload of {len(payload)} bytes, its shape needs {expected}")


PLAIN = Transform(code=0, split=_split_plain, join=_join_plain)
PLANES = Transform(code=1, split=_split_planes, join=_join_planes)
RANKS = Transform(code=2, split=_split_ranks, join=_join_ranks)
DICTIONARY = Transform(code=3, split=_split_dictionary, join=_join_dictionary)

TRANSFORMS = {each.code: each for each in (PLAIN, PLANES, RANKS, DICTIONARY)}
