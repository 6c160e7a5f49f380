"""Quantises numbers to eight bits and measures the error: the arithmetic of all lossy options.

`from_scale` and `from_int8` are plain float32 arithmetic that any reader can repeat exactly
(docs/format.md); codes are computed from the stored ends and scales. The largest error on a row's
scale is (high - low) / 510, in a group of channels half its scale.

Dimensions as in schema/teacher_output.py; C values of any kind per row, G groups of channels.
"""

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

_TOP_CODE = 255
_CODE_LIMIT = 127


def to_scale(
    values: Float[Tensor, "N C"],
) -> tuple[UInt8[Tensor, "N C"], Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Codes of each row on its own scale from `low` (code 0) to `high` (code 255), both exact.

    `low` and `high` have the dtype of the values; both are 0 in rows without values.
    """
    if not values.shape[1]:
        ends = values.new_zeros(len(values))
        return values.to(torch.uint8), ends, ends
    low, high = values.aminmax(dim=1)
    base, span = low.to(torch.float64)[:, None], (high.to(torch.float64) - low)[:, None]
    places = (values - base) * _TOP_CODE / span.where(span > 0, 1.0)
    return places.round().to(torch.uint8), low, high


def from_scale(
    codes: UInt8[Tensor, "N C"], low: Float[Tensor, " N"], high: Float[Tensor, " N"]
) -> Float[Tensor, "N C"]:
    """The values in float32: (1 - code / 255) x low + code / 255 x high, exact at both ends.

    Raises ValueError unless there is one scale per row.
    """
    if not codes.shape[:1] == low.shape == high.shape:
        raise ValueError(
            f"codes of shape {list(codes.shape)} with scales of shapes {list(low.shape)} and "
            f"{list(high.shape)}, expected one scale per row"
        )
    part = codes.to(torch.float32) / _TOP_CODE
    return (1 - part) * low.to(torch.float32)[:, None] + part * high.to(torch.float32)[:, None]


def to_int8(
    states: Float[Tensor, "N D"], group: int
) -> tuple[Int8[Tensor, "N D"], Float[Tensor, "N G"]]:
    """Codes -127..127 of each token, with one scale per at most `group` neighbouring channels.

    The D channels form as few groups as possible, all of the same size but the last. A group's
    scale is its largest magnitude / 127, rounded up to a bfloat16: it takes 2 bytes, covers any
    magnitude, and its products with codes are exact in float32.
    """
    width = states.shape[1]
    num_groups = -(-width // group)
    size = -(-width // num_groups)
    wide = states.to(torch.float32)
    padded = torch.nn.functional.pad(wide, (0, num_groups * size - width))
    peak = padded.reshape(len(states), num_groups, size).abs().amax(dim=2)
    scale = _round_up(peak / _CODE_LIMIT).where(peak > 0, 1.0)
    codes = (wide / _by_channel(scale, width)).round().clamp(-_CODE_LIMIT, _CODE_LIMIT)
    return codes.to(torch.int8), scale


def from_int8(codes: Int8[Tensor, "N D"], scale: Float[Tensor, "N G"]) -> Float[Tensor, "N D"]:
    """The states in float32: each code times its group's scale, exactly.

    Raises ValueError unless `to_int8` would divide D channels into G groups.
    """
    width, num_groups = codes.shape[1], scale.shape[1]
    if len(codes) != len(scale) or not 1 <= num_groups <= width:
        raise ValueError(
            f"scales of shape {list(scale.shape)} for codes of shape {list(codes.shape)}"
        )
    size = -(-width // num_groups)
    if -(-width // size) != num_groups:
        raise ValueError(f"{width} channels do not divide into {num_groups} groups of one size")
    return codes.to(torch.float32) * _by_channel(scale, width)


def largest_error(exact: Float[Tensor, "N C"], stored: Float[Tensor, "N C"]) -> float:
    """The largest absolute difference; 0 for no values."""
    apart = (exact.to(torch.float64) - stored.to(torch.float64)).abs()
    return float(apart.max()) if apart.numel() else 0.0


def largest_relative_error(exact: Float[Tensor, "N D"], stored: Float[Tensor, "N D"]) -> float:
    """The largest norm of a row's error, as a share of the row's norm; 0 for no rows.

    A logit changes by at most this share of |state| x |row of the head|, a cosine by about this
    share.
    """
    length = exact.to(torch.float64).norm(dim=1)
    apart = (exact.to(torch.float64) - stored.to(torch.float64)).norm(dim=1)
    shares = apart / length.where(length > 0, 1.0)
    return float(shares.max()) if len(shares) else 0.0


def _by_channel(scale: Tensor, width: int) -> Tensor:
    """[N, D] float32: each channel's scale."""
    size = -(-width // scale.shape[1])
    return scale.to(torch.float32).repeat_interleave(size, dim=1)[:, :width]


def _round_up(values: Tensor) -> Tensor:
    """Positive float32 values as bfloat16, never smaller."""
    bits = values.view(torch.int32) + 0xFFFF
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)
