"""A tensor as one checked zstd frame, and back, to the bit.

A frame is one zstd frame (level 3, content size and checksum in it) over

    byte 0: dtype code (`DTYPES`), byte 1: transform code (transforms.py),
    byte 2: number of dimensions n, n x uint32: shape,
    then what the transform made of the values, little-endian; docs/format.md has every byte.

Promises: any dtype of `DTYPES` comes back bit for bit, NaN payloads included; a damaged frame or
one that claims more than it can hold is a `ShardCorruptError` before memory is taken for it.
Any number of threads may encode and decode at once; zstd leaves them the interpreter meanwhile.
"""

import math
import struct
import threading
from collections.abc import Sequence

import numpy as np
import torch
import zstandard
from jaxtyping import Shaped
from torch import Tensor

from teacher_cache.codec.transforms import PLAIN, TRANSFORMS, Transform
from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.schema.fingerprint import tensor_bytes

DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.bfloat16,
    3: torch.float16,
    4: torch.float64,
    5: torch.int8,
    6: torch.uint8,
    7: torch.int16,
    8: torch.int32,
    9: torch.int64,
    10: torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ARRAYS = {  # what numpy calls them; it has no bfloat16
    dtype: np.dtype("<i2" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."))
    for dtype in _CODES
}

MAX_FRAME_BYTES = 2**32
"""Content of the largest frame, and of the largest column; a larger claim is taken for damage."""

MAX_RATIO = 1000
"""Content of a frame of more than `FREE_BYTES` is at most so many times as long as the frame: what
a small file can ask for in memory is bounded by that."""

FREE_BYTES = 2**24

MAX_DIMS = 8
"""Dimensions of a column; more are taken for damage."""

_BLOCK_BYTES = 2**17  # zstd: a block holds at most this much and takes at least 4 bytes


def encode_frame(
    values: Shaped[Tensor, "..."], transforms: Sequence[Transform] = (PLAIN,)
) -> bytes:
    """One checked zstd frame of a tensor of any shape, in the layout that gives the fewest bytes.

    ValueError for a dtype without a code, or for more than `MAX_FRAME_BYTES` or `MAX_DIMS`.
    """
    if values.dtype not in _CODES or values.ndim > MAX_DIMS:
        raise ValueError(
            f"no frame holds {values.dtype} in {values.ndim} dimensions; a frame has at most "
            f"{MAX_DIMS} of one of these dtypes: {list(_CODES)}"
        )
    num_bytes = values.numel() * values.dtype.itemsize
    if num_bytes > MAX_FRAME_BYTES // 2:
        raise ValueError(f"a column of {num_bytes} bytes; the limit is {MAX_FRAME_BYTES // 2}")
    bits = np.frombuffer(tensor_bytes(values), f"<u{values.dtype.itemsize}").reshape(values.shape)
    frames: list[bytes] = []
    for transform in transforms:
        codes = (_CODES[values.dtype], transform.code, values.ndim)
        header = struct.pack(f"<BBB{values.ndim}I", *codes, *values.shape)
        frames.append(_compress([header, *transform.split(bits)]))
    return min(frames, key=len)


def decode_frame(frame: bytes) -> Shaped[Tensor, "..."]:
    """The tensor that `encode_frame` was given; raises `ShardCorruptError` for anything else."""
    content = _decompress(frame)
    if len(content) < 3 or len(content) < 3 + 4 * content[2] or content[2] > MAX_DIMS:
        raise ShardCorruptError(
            f"a frame of {len(content)} bytes has no room for its header, or more than {MAX_DIMS} "
            f"dimensions: it begins with {content[:3].hex()}"
        )
    dtype_code, transform_code, num_dims = content[:3]
    shape: tuple[int, ...] = struct.unpack_from(f"<{num_dims}I", content, 3)
    if dtype_code not in DTYPES or transform_code not in TRANSFORMS:
        raise ShardCorruptError(
            f"dtype code {dtype_code} or transform code {transform_code} is unknown; known are "
            f"{list(DTYPES)} and {list(TRANSFORMS)}"
        )
    dtype = DTYPES[dtype_code]
    if math.prod(shape) * dtype.itemsize > MAX_FRAME_BYTES:  # a dictionary's places are short
        raise ShardCorruptError(f"a frame of {len(frame)} bytes claims shape {list(shape)}")
    payload = np.frombuffer(content, np.uint8, offset=3 + 4 * num_dims)
    bits = TRANSFORMS[transform_code].join(payload, shape, dtype.itemsize)
    try:
        values = torch.from_numpy(bits.view(_ARRAYS[dtype]).reshape(shape))
        return values if values.dtype == dtype else values.view(dtype)
    except ValueError as error:  # sizes beyond 64 bits, beside an axis of size 0
        raise ShardCorruptError(f"no tensor has shape {list(shape)}") from error


def _compress(parts: Sequence[bytes]) -> bytes:
    """One frame in which each part begins a block: bytes of one kind share their statistics."""
    num_bytes = sum(map(len, parts))
    stream = _zstd.compressor.compressobj(size=num_bytes)
    pieces: list[bytes] = []
    for part in parts:
        if part:
            pieces.append(stream.compress(part))
            pieces.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    pieces.append(stream.flush())
    frame = b"".join(pieces)
    if num_bytes > _most_content(frame):
        raise ValueError(
            f"{num_bytes} bytes of a column shrink to {len(frame)}: no reader would believe that; "
            "the teacher repeats one number"
        )
    return frame


def _most_content(frame: bytes) -> int:
    """Bytes that a frame may claim to hold."""
    blocks = (len(frame) // 4 + 1) * _BLOCK_BYTES
    return min(MAX_FRAME_BYTES, blocks, max(FREE_BYTES, MAX_RATIO * len(frame)))


def _decompress(frame: bytes) -> bytes:
    try:
        claimed = zstandard.get_frame_parameters(frame)
        # An unknown size is reported as 2**64 - 1, beyond every limit.
        if not claimed.has_checksum or claimed.content_size > _most_content(frame):
            raise ShardCorruptError(
                f"a frame of {len(frame)} bytes claims {claimed.content_size} bytes of content "
                f"{'with' if claimed.has_checksum else 'without'} a checksum"
            )
        return _zstd.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ShardCorruptError(f"a zstd frame is damaged: {error}") from error


class _Zstd(threading.local):
    """One of each for a thread: to make one takes longer than most frames do."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()
