"""Encodes a tensor as one checked zstd frame, and decodes it exactly.

A frame is one zstd frame (level 3, content size and checksum in it) over

    byte 0: dtype code (`DTYPES`), byte 1: transform code (transforms.py),
    byte 2: number of dimensions n, n x uint32: shape,
    then the transformed values, little-endian; docs/format.md describes every byte.

Restores every dtype of `DTYPES` bit for bit, NaN payloads included. Raises `ShardCorruptError` for
a damaged frame, or one that claims more than it can hold, before it allocates. Several threads may
encode and decode at once.
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
_ARRAYS = {  # numpy has no bfloat16
    dtype: np.dtype("<i2" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."))
    for dtype in _CODES
}

MAX_FRAME_BYTES = 2**32
"""Largest content of a frame and largest column; a larger claim counts as damage."""

MAX_RATIO = 1000
"""Above `FREE_BYTES`, the content is at most this many times as long as the frame. It limits the
memory that a small file can ask for."""

FREE_BYTES = 2**24

MAX_DIMS = 8
"""Most dimensions of a column; more count as damage."""

_BLOCK_BYTES = 2**17  # zstd: a block holds at most this much and takes at least 4 bytes


def encode_frame(
    values: Shaped[Tensor, "..."], transforms: Sequence[Transform] = (PLAIN,)
) -> bytes:
    """One checked zstd frame of a tensor of any shape; takes the transform with the fewest bytes.

    Raises ValueError for a dtype without a code, and beyond `MAX_FRAME_BYTES` or `MAX_DIMS`.
    """
    if values.dtype not in _CODES or values.ndim > MAX_DIMS:
        raise ValueError(
            f"a frame cannot hold {values.dtype} in {values.ndim} dimensions; expected at most "
            f"{MAX_DIMS} dimensions and one of the dtypes {list(_CODES)}"
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
    """The inverse of `encode_frame`; raises `ShardCorruptError` for any other bytes."""
    content = _decompress(frame)
    if len(content) < 3 or len(content) < 3 + 4 * content[2] or content[2] > MAX_DIMS:
        raise ShardCorruptError(
            f"a frame of {len(content)} bytes is too short for its header, or has more than "
            f"{MAX_DIMS} dimensions: it begins with {content[:3].hex()}"
        )
    dtype_code, transform_code, num_dims = content[:3]
    shape: tuple[int, ...] = struct.unpack_from(f"<{num_dims}I", content, 3)
    if dtype_code not in DTYPES or transform_code not in TRANSFORMS:
        raise ShardCorruptError(
            f"dtype code {dtype_code} or transform code {transform_code} is unknown; known are "
            f"{list(DTYPES)} and {list(TRANSFORMS)}"
        )
    dtype = DTYPES[dtype_code]
    if math.prod(shape) * dtype.itemsize > MAX_FRAME_BYTES:  # a dictionary stores short indices
        raise ShardCorruptError(f"a frame of {len(frame)} bytes claims shape {list(shape)}")
    payload = np.frombuffer(content, np.uint8, offset=3 + 4 * num_dims)
    bits = TRANSFORMS[transform_code].join(payload, shape, dtype.itemsize)
    try:
        values = torch.from_numpy(bits.view(_ARRAYS[dtype]).reshape(shape))
        return values if values.dtype == dtype else values.view(dtype)
    except ValueError as error:  # sizes beyond 64 bits, beside an axis of size 0
        raise ShardCorruptError(f"no tensor has shape {list(shape)}") from error


def _compress(parts: Sequence[bytes]) -> bytes:
    """One frame in which each part begins a block, and so has its own statistics."""
    num_bytes = sum(map(len, parts))
    stream = _zstd.compressor.compressobj(size=num_bytes)
    frame = b""
    for part in filter(None, parts):
        frame += stream.compress(part) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    frame += stream.flush()
    if num_bytes > _most_content(frame):
        raise ValueError(
            f"a column of {num_bytes} bytes compresses to {len(frame)}, which readers refuse as "
            "damage: the teacher repeats one number"
        )
    return frame


def _most_content(frame: bytes) -> int:
    """The most bytes that a frame may claim to hold."""
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
    """One compressor and decompressor per thread; creating one takes longer than most frames."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()
