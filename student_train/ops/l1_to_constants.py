"""Computes the L1 distance of a row of probabilities to constants: F(c) = sum_v |q_v - c|.

    F(c) = sum q - V c + 2 U(c),   U(c) = the sum over q < c of c - q

U needs only the number of probabilities under c and their sum: sort all of them once or, on a CPU
and over a large vocabulary, count and sum them in narrow bins, 2 to 5 times as fast
(docs/method.md). Bins below that of c are exact; the bin of c itself gives bounds. A row for which
these leave F uncertain by more than one rounding of 1 is sorted after all. So F is exact to
float32's rounding (float64's for float64). V vocabulary rows, n rows, M constants, B bins.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

_SORTED_AT_ONCE = 2**22
_COUNTED_AT_ONCE = 4
"""Rows; few, so that they are still in cache when read again."""
_LEAST_COUNTED = 2**13
"""Sorting is as fast for smaller vocabularies."""
_SHIFT = 12
"""Low bits of a float32 that do not select its bin: each power of two has 2,048 bins."""
_FLOOR, _LEAST_FLOOR, _SCALE = -10, -40, 100
"""As powers of two: floor over the greatest constant, least floor, and scale (`_Bins`)."""
_WHOLE = 2.0**60


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bins:
    """Intervals of x = q + floor whose float32 values share their leading bits, up to the last c.

    They are equally wide where q is under the floor, and q / 2,048 wide above: absolute errors
    matter, and most probabilities are tiny. Bits are taken of values scaled by 2^100, which makes
    the leading bits, as a whole number, greater than the number of probabilities.
    """

    floor: float
    first: int
    """Leading bits of the first bin."""
    least_B: Tensor
    """The bits of a bin's least x as a whole number; float64 like the others."""
    lower_B: Tensor
    width_B: Tensor
    place_M: Tensor
    """The bin of each constant, and how far above the bin's lower edge it is."""
    above_M: Tensor

    @classmethod
    def of(cls, constants_M: Tensor, vocab_size: int) -> "_Bins | None":
        """None where counting is not faster than sorting, or not exact.

        A GPU sorts fast and adds in no fixed order; float64 has no bits to spare.
        """
        if constants_M.is_cuda or constants_M.dtype != torch.float32:
            return None
        exponent = max(math.frexp(float(constants_M.max()))[1] + _FLOOR, _LEAST_FLOOR)
        floor, first = 2.0**exponent, (127 + exponent + _SCALE) << (23 - _SHIFT)
        if not _LEAST_COUNTED <= vocab_size < first:
            return None
        place_M = (_bits(constants_M, floor) >> _SHIFT).long() - first
        bits = torch.arange(first, first + int(place_M.max()) + 2, dtype=torch.int32) << _SHIFT
        edges = bits.view(torch.float32).double() / 2.0**_SCALE
        return cls(
            floor=floor,
            first=first,
            least_B=bits[:-1].double(),
            lower_B=edges[:-1],
            width_B=edges.diff(),
            place_M=place_M,
            above_M=constants_M.double() + floor - edges[place_M],
        )

    def sums(self, row_V: Tensor) -> Tensor:
        """Of the bits of all x in each bin, as whole numbers: exact in float64."""
        bits = _bits(row_V, self.floor)
        place = (bits >> _SHIFT).sub_(self.first)
        return place.bincount(bits.double(), minlength=len(self.least_B))[: len(self.least_B)]


def _bits(values: Tensor, floor: float) -> Tensor:
    """Of values + floor, scaled, as int32."""
    scale = 2.0**_SCALE
    return torch.add(torch.tensor(floor * scale), values, alpha=scale).view(torch.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantDistances:
    """F at M constants, prepared for many rows of V probabilities."""

    constants: Float[Tensor, " M"]
    rows_at_once: int
    """Rows to pass at a time: fewer take more time, more take more memory."""
    bins: _Bins | None

    @classmethod
    def of(cls, constants: Float[Tensor, " M"], vocab_size: int) -> "ConstantDistances":
        """For constants >= 0, at least one."""
        bins = _Bins.of(constants, vocab_size)
        rows = _COUNTED_AT_ONCE if bins is not None else max(1, _SORTED_AT_ONCE // vocab_size)
        return cls(constants=constants, rows_at_once=rows, bins=bins)

    def __call__(self, rows_nV: Float[Tensor, "n V"]) -> Float[Tensor, "n M"]:
        """`sum_v |rows[n, v] - constants[m]|` in float64, for rows in the constants' dtype.

        NaN for a row with NaN.
        """
        total_n1 = rows_nV.sum(dim=1, keepdim=True, dtype=torch.float64)
        if self.bins is None or not bool(total_n1.isfinite().all()):
            under_nM = _under_by_sorting(rows_nV, self.constants)
        else:
            under_nM, known_n = _under_by_counting(rows_nV, self.bins)
            if not bool(known_n.all()):
                under_nM[~known_n] = _under_by_sorting(rows_nV[~known_n], self.constants)
        return (total_n1 - rows_nV.shape[1] * self.constants.double()).add_(under_nM, alpha=2)


def _under_by_counting(rows_nV: Tensor, bins: _Bins) -> tuple[Tensor, Tensor]:
    """U for each constant, in float64, and for which rows it is exact enough.

    One histogram gives both the number of x in a bin and their sum: the bits of n of them add up to
    n times the bin's least and a rest, which is smaller than one least because n < `first`. In the
    bin of c the sum is least where all x are equal, and greatest where all are at the edges.
    """
    sums_nB = torch.stack([bins.sums(row_V) for row_V in rows_nV])
    number_nB = (sums_nB / bins.least_B).floor_()
    rest_nB = sums_nB.addcmul_(number_nB, bins.least_B, value=-1)
    rest_nB.mul_(bins.width_B / 2**_SHIFT)
    own_nM, rest_nM = (each.index_select(1, bins.place_M) for each in (number_nB, rest_nB))
    least_nM = (own_nM * bins.above_M).sub_(rest_nM).clamp_(min=0)
    width_M, lower_M = bins.width_B[bins.place_M], bins.lower_B[bins.place_M]
    most_nM = (own_nM - rest_nM / width_M).mul_(bins.above_M)
    known_n = (most_nM - least_nM).amax(dim=1) <= torch.finfo(rows_nV.dtype).eps
    upto_nM = number_nB.cumsum(1).index_select(1, bins.place_M)
    mass_nB = rest_nB.addcmul_(number_nB, bins.lower_B)
    mass_nM = mass_nB.cumsum(1).index_select(1, bins.place_M)
    before_nM = (upto_nM - own_nM) * (bins.above_M + lower_M)
    before_nM -= mass_nM - (rest_nM + own_nM * lower_M)
    return before_nM.add_(least_nM.add_(most_nM), alpha=0.5), known_n


def _under_by_sorting(rows_nV: Tensor, constants_M: Tensor) -> Tensor:
    """U for any rows, in float64. Sums of whole numbers are the same in any order."""
    ascending_nV = _sorted(rows_nV)
    sum_nV = functional.pad((ascending_nV.double() * _WHOLE).long().cumsum(1), (1, 0))
    number_nM = torch.searchsorted(ascending_nV, constants_M.repeat(len(rows_nV), 1))
    sum_nM = sum_nV.gather(1, number_nM).double() / _WHOLE
    return number_nM * constants_M.double() - sum_nM


def _sorted(rows_nV: Tensor) -> Tensor:
    """Each row ascending. NumPy's sort, without indices, is three times as fast on a CPU."""
    if rows_nV.is_cuda:
        return rows_nV.sort(dim=1).values
    return torch.from_numpy(np.sort(rows_nV.numpy(), axis=1))
