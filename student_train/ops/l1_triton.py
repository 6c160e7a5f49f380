"""Computes the L1 distance of every pair of rows with a Triton kernel, by tiles, for `l1.py`.

`torch.cdist(p=1)` reads two values from memory for every |a - b| that it adds. A program here keeps
the sums of 32 x 64 pairs in registers, and each value that it reads serves 32 or 64 of them.
Columns are cut into spans for separate programs, so that few pairs still fill a GPU. Promise: no
atomic operation, and one order of addition for every pair: the same bits always on one kind of GPU.
Half precision is widened in registers. Needs triton; runs on a CPU where TRITON_INTERPRET=1 was set
before triton was imported, as the tests do.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

SPAN = 1024
"""Columns that one program adds up."""
BLOCK_SPANS = 8
"""Spans of one launch: they leave 8 N x M numbers for the last addition."""
TILE = {"TILE_N": 32, "TILE_M": 64, "LANES": 4}
"""Pairs of one program, and its columns at a time; each a power of two."""
_ADDED_AT_ONCE = 1024


@triton.jit
@no_type_check
def span_distances(
    left, right, parts, num_left, num_right, num_columns,
    left_batch_stride, left_stride, right_batch_stride, right_stride,
    SPAN: tl.constexpr, TILE_N: tl.constexpr, TILE_M: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """parts[span, batch, n, m] = the span's share of the distance; grid (tiles, spans, batch)."""
    num_tiles_m = tl.cdiv(num_right, TILE_M)
    row_N = (tl.program_id(0) // num_tiles_m) * TILE_N + tl.arange(0, TILE_N)
    row_M = (tl.program_id(0) % num_tiles_m) * TILE_M + tl.arange(0, TILE_M)
    start = tl.program_id(1) * SPAN
    batch = tl.program_id(2).to(tl.int64)
    column = start + tl.arange(0, LANES)
    left += batch * left_batch_stride
    right += batch * right_batch_stride
    here_N = left + row_N.to(tl.int64)[:, None] * left_stride + column
    here_M = right + row_M.to(tl.int64)[:, None] * right_stride + column
    inside_N, inside_M = (row_N < num_left)[:, None], (row_M < num_right)[:, None]
    own = tl.load(here_N, inside_N & (column < num_columns), other=0.0)
    theirs = tl.load(here_M, inside_M & (column < num_columns), other=0.0)
    sums = tl.zeros((TILE_N, TILE_M, LANES), tl.float32)
    for _ in range(0, tl.minimum(SPAN, num_columns - start), LANES):
        column += LANES
        here_N += LANES
        here_M += LANES
        # Load the next columns while these are added up.
        next_own = tl.load(here_N, inside_N & (column < num_columns), other=0.0)
        next_theirs = tl.load(here_M, inside_M & (column < num_columns), other=0.0)
        sums += tl.abs(own.to(tl.float32)[:, None, :] - theirs.to(tl.float32)[None, :, :])
        own, theirs = next_own, next_theirs
    pair = row_N.to(tl.int64)[:, None] * num_right + row_M[None, :]
    problem = tl.program_id(1).to(tl.int64) * tl.num_programs(2) + batch
    here = parts + problem * num_left * num_right + pair
    tl.store(here, tl.sum(sums, axis=2), inside_N & (row_M < num_right)[None, :])


@triton.jit
@no_type_check
def add_spans(parts, total, num_pairs, num_spans, AT_ONCE: tl.constexpr):
    """total[i] += parts[0, i] + parts[1, i] + ..., in this order."""
    pair = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)
    inside = pair < num_pairs
    found = tl.zeros((AT_ONCE,), tl.float32)
    for _ in range(num_spans):
        found += tl.load(parts + pair, inside)
        parts += num_pairs
    tl.store(total + pair, tl.load(total + pair, inside) + found, inside)


@torch.no_grad()
def tiled_l1(
    student: Float[Tensor, "B N C"], teacher: Float[Tensor, "B M C"]
) -> Float[Tensor, "B N M"]:
    """`sum_c |student[b, n, c] - teacher[b, m, c]|` of float32 or half rows, summed in float32."""
    student, teacher = _dense_rows(student), _dense_rows(teacher)
    num_problems, num_left, num_columns = student.shape
    num_right = teacher.shape[1]
    total = student.new_zeros(num_problems, num_left, num_right, dtype=torch.float32)
    if not total.numel():
        return total
    parts = total.new_empty(BLOCK_SPANS, *total.shape)
    num_tiles = -(-num_left // TILE["TILE_N"]) * -(-num_right // TILE["TILE_M"])
    add_grid = (-(-total.numel() // _ADDED_AT_ONCE),)
    with torch.cuda.device_of(total):
        for start in range(0, num_columns, SPAN * BLOCK_SPANS):
            columns = slice(start, start + SPAN * BLOCK_SPANS)
            own, theirs = student[..., columns], teacher[..., columns]
            num_here = own.shape[2]
            num_spans = -(-num_here // SPAN)
            span_distances[num_tiles, num_spans, num_problems](
                own, theirs, parts, num_left, num_right, num_here, *own.stride()[:2],
                *theirs.stride()[:2], SPAN=SPAN, **TILE,
            )  # fmt: skip
            add_spans[add_grid](parts, total, total.numel(), num_spans, AT_ONCE=_ADDED_AT_ONCE)
    return total


def _dense_rows(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()
