"""Records as named planes, planes as checked zstd frames, and back, to the bit.

A plane is one tensor; a frame is one zstd frame (level 3, content size and checksum in it) over

    byte 0: dtype code (`DTYPES`), byte 1: number of dimensions n, n x uint32: shape,
    then the values, little-endian, C order.

Promises: any dtype of `DTYPES` comes back bit for bit, NaN payloads included; a damaged frame or
one that claims more than it can hold is a `ShardCorruptError` before memory is taken for it.
Planes of a tier are fixed (`planes_of`): every row of a cache has the same ones, empty or not.
"""

import math
import struct
from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np
import torch
import zstandard
from jaxtyping import Shaped
from torch import Tensor

from teacher_cache.fingerprint import tensor_bytes
from teacher_cache.manifest import ShardCorruptError
from teacher_cache.schema import (
    AffinityRecord,
    HiddenRecord,
    SketchRecord,
    TeacherOutput,
    TopKRecord,
    ViewGrid,
)
from teacher_cache.settings import RecordKind

Part = Literal["vision", "sketch", "affinity", "response", "hidden"]

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

MAX_FRAME_BYTES = 2**32
"""Content of the largest frame; a larger claim is taken for damage."""

_BLOCK_BYTES = 2**17  # zstd: a block holds at most this much and takes at least 4 bytes
_IS_RESPONSE, _AFTER_IMAGE = 1, 2  # bits of the plane content_flags

_SPAN_PLANES = ("views", "content_ids", "content_flags")
PART_PLANES: dict[Part, tuple[str, ...]] = {
    "vision": ("v_ids", "v_logits", "v_lse", "v_tail"),
    "sketch": ("s_codes", "s_scale", "s_shift"),
    "affinity": ("a_cosine",),
    "response": ("r_ids", "r_logits", "r_lse", "r_tail"),
    "hidden": ("h_vision", "h_text", "h_predicting"),
}
TIER_PARTS: dict[RecordKind, frozenset[Part]] = {
    "topk": frozenset({"vision", "affinity", "response"}),
    "topk+sketch": frozenset({"vision", "sketch", "affinity", "response"}),
    "hidden": frozenset({"hidden"}),
}


def encode_frame(values: Shaped[Tensor, "..."]) -> bytes:
    """One checked zstd frame of a tensor of any shape; ValueError for a dtype without a code."""
    if values.dtype not in _CODES:
        raise ValueError(f"no frame holds {values.dtype}; known dtypes: {list(_CODES)}")
    header = struct.pack(f"<BB{values.ndim}I", _CODES[values.dtype], values.ndim, *values.shape)
    content = header + tensor_bytes(values)
    if len(content) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(content)} bytes; the limit is {MAX_FRAME_BYTES}")
    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(content)


def decode_frame(frame: bytes) -> Shaped[Tensor, "..."]:
    """The tensor that `encode_frame` was given; raises `ShardCorruptError` for anything else."""
    content = _decompress(frame)
    if len(content) < 2 or len(content) < 2 + 4 * content[1]:
        raise ShardCorruptError(f"a frame of {len(content)} bytes has no room for its header")
    code, num_dims = content[0], content[1]
    shape = struct.unpack_from(f"<{num_dims}I", content, 2)
    start = 2 + 4 * num_dims
    if code not in DTYPES:
        raise ShardCorruptError(f"dtype code {code} is unknown; known codes: {list(DTYPES)}")
    if math.prod(shape) * DTYPES[code].itemsize != len(content) - start:
        raise ShardCorruptError(
            f"shape {list(shape)} of {DTYPES[code]} does not fill {len(content) - start} bytes"
        )
    try:
        values = torch.empty(shape, dtype=DTYPES[code])
    except RuntimeError as error:  # sizes beyond 64 bits, beside an axis of size 0
        raise ShardCorruptError(f"no tensor has shape {list(shape)}") from error
    if values.numel():
        # A copy: torch wants aligned memory that it may write to.
        stored = np.frombuffer(content, dtype=np.uint8, offset=start)
        values.reshape(-1).view(torch.uint8).numpy()[:] = stored
    return values


def _decompress(frame: bytes) -> bytes:
    try:
        claimed = zstandard.get_frame_parameters(frame)
        limit = min(MAX_FRAME_BYTES, (len(frame) // 4 + 1) * _BLOCK_BYTES)
        # An unknown size is reported as 2**64 - 1, beyond every limit.
        if not claimed.has_checksum or claimed.content_size > limit:
            raise ShardCorruptError(
                f"a frame of {len(frame)} bytes claims {claimed.content_size} bytes of content "
                f"{'with' if claimed.has_checksum else 'without'} a checksum"
            )
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ShardCorruptError(f"a zstd frame is damaged: {error}") from error


def planes_of(parts: Collection[Part]) -> frozenset[str]:
    """Names of the planes that hold these parts; the token spans are always among them."""
    return frozenset(_SPAN_PLANES).union(*(PART_PLANES[part] for part in parts))


def parts_in(output: TeacherOutput) -> frozenset[Part]:
    """The parts that an output has."""
    return frozenset(part for part in PART_PLANES if getattr(output, part) is not None)


def output_planes(output: TeacherOutput) -> dict[str, Tensor]:
    """The tensors of an output by plane name, each as the record holds it."""
    views = [[view.image, view.view, view.rows, view.cols] for view in output.views]
    flags = output.is_response * _IS_RESPONSE + output.after_image * _AFTER_IMAGE
    planes = {
        "views": torch.tensor(views, dtype=torch.int32).reshape(-1, 4),
        "content_ids": output.content_ids,
        "content_flags": flags.to(torch.uint8),
    }
    for prefix, record in (("v", output.vision), ("r", output.response)):
        if record is not None:
            planes[f"{prefix}_ids"] = record.ids
            planes[f"{prefix}_logits"] = record.logits
            planes[f"{prefix}_lse"] = record.logsumexp
            planes[f"{prefix}_tail"] = record.log_tail
    if output.sketch is not None:
        planes["s_codes"] = output.sketch.codes
        planes["s_scale"] = output.sketch.scale
        planes["s_shift"] = output.sketch.tail_shift
    if output.affinity is not None:
        planes["a_cosine"] = output.affinity.cosine
    if output.hidden is not None:
        planes["h_vision"] = output.hidden.vision
        planes["h_text"] = output.hidden.text
        planes["h_predicting"] = output.hidden.predicting
    return planes


def output_from_planes(planes: Mapping[str, Tensor], vocab_size: int) -> TeacherOutput:
    """The inverse of `output_planes`; a part none of whose planes is given is None.

    Raises KeyError where a part is given in part, ValueError where its numbers do not add up.
    """
    flags = planes["content_flags"]
    has = {part: any(name in planes for name in names) for part, names in PART_PLANES.items()}

    def top_k(prefix: str) -> TopKRecord:
        return TopKRecord(
            ids=planes[f"{prefix}_ids"],
            logits=planes[f"{prefix}_logits"],
            logsumexp=planes[f"{prefix}_lse"],
            log_tail=planes[f"{prefix}_tail"],
            vocab_size=vocab_size,
        )

    def sketch() -> SketchRecord:
        return SketchRecord(
            codes=planes["s_codes"], scale=planes["s_scale"], tail_shift=planes["s_shift"]
        )

    def hidden() -> HiddenRecord:
        return HiddenRecord(
            vision=planes["h_vision"], text=planes["h_text"], predicting=planes["h_predicting"]
        )

    return TeacherOutput(
        views=tuple(
            ViewGrid(image=image, view=view, rows=rows, cols=cols)
            for image, view, rows, cols in planes["views"].tolist()
        ),
        content_ids=planes["content_ids"],
        is_response=(flags & _IS_RESPONSE).bool(),
        after_image=(flags & _AFTER_IMAGE).bool(),
        vision=top_k("v") if has["vision"] else None,
        sketch=sketch() if has["sketch"] else None,
        affinity=AffinityRecord(cosine=planes["a_cosine"]) if has["affinity"] else None,
        response=top_k("r") if has["response"] else None,
        hidden=hidden() if has["hidden"] else None,
    )
