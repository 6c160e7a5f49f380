"""Euclidean distances of logits over all of V, most of them in closed form.

Teacher logits that are affine in a few coordinates, t = mu + U a (states under a linear head, codes
of a sketch), need no decoding: with d = s - mu

    |s - t|^2 = |d|^2 - 2 (d U) a + a' (U'U) a

so the student's rows are read once, a block of columns at a time, no pair costs anything of size V,
and the Gram matrix U'U of a frozen teacher is computed once. Other teachers are compared block by
block. Promise: sums in float64, no gradient, inputs untouched, neither N x V nor M x V numbers at
once. Dimensions as in teacher_output.py, S the number of coordinates.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from student_train.ops.precision import at_least_float32
from student_train.signals.sketch_code import SketchCode
from student_train.signals.teacher_signal import DenseSignal, HiddenSignal, Signal
from student_train.signals.top_k import TopKSignal

_GRAM_ROWS = 8192
_grams = WeakTensorKeyDictionary()
"""U'U of the directions that are alive; a teacher's never change."""


class _Affine(NamedTuple):
    coordinates_MS: Tensor
    directions_VS: Tensor
    offset_V: Tensor | None


@torch.no_grad()
def l2_distances(
    student: Iterable[Float[Tensor, "N _"]],
    num_students: int,
    teacher: Signal,
    num_problems: int = 1,
) -> Float[Tensor, "B n m"]:
    """`sqrt(sum_v (s_v - t_v)^2)` in float64; `student` gives all V columns in order, in blocks.

    N = B n and M = B m: the rows are those of B problems of one shape, one after another.
    ValueError where the teacher neither knows nor estimates every logit (`Signal.logits_at`).
    """
    if isinstance(teacher, HiddenSignal):
        head = teacher.head
        affine = _Affine(teacher.hidden, head.weight, head.bias)
    elif (code := _codes_of_all(teacher)) is not None:
        values_MS = code.codes.float() * code.scale[:, None]
        affine = _Affine(values_MS, code.basis.directions, code.basis.mean_logits)
    else:
        return _decoded(student, num_students, teacher, num_problems)
    coordinates_MS = affine.coordinates_MS.double()
    num_coordinates = coordinates_MS.shape[1]
    squares_N = coordinates_MS.new_zeros(num_students)
    across_NS = coordinates_MS.new_zeros(num_students, num_coordinates)
    start = 0
    for block in student:
        rows = slice(start, start + block.shape[1])
        start = rows.stop
        apart = block if affine.offset_V is None else block - affine.offset_V[rows]
        squares_N += apart.square().sum(dim=1, dtype=torch.float64)
        across_NS += apart @ affine.directions_VS[rows].to(apart.dtype)
    squares_M = ((coordinates_MS @ _gram(affine.directions_VS)) * coordinates_MS).sum(dim=1)
    apart = (num_problems, -1)
    coordinates_BmS = coordinates_MS.unflatten(0, apart)
    squared_Bnm = -2 * across_NS.unflatten(0, apart) @ coordinates_BmS.mT
    squared_Bnm += squares_N.unflatten(0, apart)[:, :, None]
    squared_Bnm += squares_M.unflatten(0, apart)[:, None]
    return squared_Bnm.clamp_(min=0).sqrt_()


def _codes_of_all(teacher: Signal) -> SketchCode | None:
    """The codes, where they are what is known of every position: one that keeps V is exact."""
    if not isinstance(teacher, TopKSignal) or teacher.ids.shape[1] == teacher.vocab_size:
        return None
    return teacher.sketch


def _gram(directions_VS: Tensor) -> Tensor:
    if directions_VS not in _grams:
        size = directions_VS.shape[1]
        gram_SS = directions_VS.new_zeros(size, size, dtype=torch.float64)
        for rows in directions_VS.split(_GRAM_ROWS):
            wide = at_least_float32(rows)
            gram_SS += wide.T @ wide
        _grams[directions_VS] = gram_SS
    return _grams[directions_VS]


def _decoded(
    student: Iterable[Tensor],
    num_students: int,
    teacher: DenseSignal | TopKSignal,
    num_problems: int,
) -> Tensor:
    """Block by block, about the teachers' mean, which takes off most of what would cancel."""
    shape = num_problems, num_students // num_problems, teacher.num_rows // num_problems
    squared_Bnm = teacher.logits.new_zeros(shape, dtype=torch.float64)
    start = 0
    for block in student:
        ids = torch.arange(start, start + block.shape[1], device=block.device)
        start += block.shape[1]
        theirs = teacher.logits_at(ids).to(block.dtype).unflatten(0, (num_problems, -1))
        middle = theirs.mean(dim=1, keepdim=True)
        own, theirs = block.unflatten(0, (num_problems, -1)) - middle, theirs - middle
        squared_Bnm -= 2 * (own @ theirs.mT)
        squared_Bnm += own.square().sum(dim=2, dtype=torch.float64)[:, :, None]
        squared_Bnm += theirs.square().sum(dim=2, dtype=torch.float64)[:, None]
    return squared_Bnm.clamp_(min=0).sqrt_()
