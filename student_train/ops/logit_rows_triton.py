"""Reads what losses need from rows of logits, and writes their gradient, with Triton kernels.

One pass reads, a second one writes. A row z has W columns; the teacher's vocabulary is the first V,
of which it keeps K:

    log_tail    log sum of exp z over the tail: the V - K columns that are not kept
    log_extra   the same over the columns from V on
    tail_mean   mean of z over the tail, weighted by each column's share of the tail's sum
    gap         the same mean of z - e, with an estimate e of the teacher's log p
    least       the least z of the tail; its largest entries come from maxima of 64 columns

A bucketed divergence and a cross-entropy need no more than these and z at single columns. No atomic
operation, so the same bits always on one kind of GPU; sums in float32. Needs triton.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

COLUMNS = 2048
"""Columns of a row in one program."""
GROUP = 64
"""Columns that share one stored maximum."""
_WORD = 32


class RowParts(NamedTuple):
    """What one pass over the rows reads, without gradients. Log sums of nothing are -inf."""

    log_tail: Float[Tensor, " N"]
    log_extra: Float[Tensor, " N"]
    gap: Float[Tensor, " N"]
    """0 without an estimate."""
    tail_mean: Float[Tensor, " N"]
    least: Float[Tensor, " N"]
    group_maxima: Float[Tensor, "N G"]


class TailWeights(NamedTuple):
    """The gradient of a total with respect to what a pass has read, and to single logits."""

    log_tail: Float[Tensor, " N"]
    log_extra: Float[Tensor, " N"]
    gap: Float[Tensor, " N"]
    label: Float[Tensor, " N"]


@triton.jit
@no_type_check
def read_rows(
    logits, bits, estimate, found, maxima, num_columns, vocab_size, stride, bits_stride,
    estimate_stride, num_groups,
    ESTIMATED: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """found[:, row, block]: log_tail, log_extra, tail_mean, gap, least; grid (blocks, rows)."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    z = tl.load(logits + row * stride + column, column < num_columns, other=0.0).to(tl.float32)
    word = tl.load(bits + row * bits_stride + column // 32, column < vocab_size, other=0)
    in_tail = (column < vocab_size) & (((word >> (column % 32)) & 1) == 0)
    in_extra = (column >= vocab_size) & (column < num_columns)
    outside = tl.where(in_tail, z, -float("inf"))
    most = tl.max(outside, axis=0)
    some = most > -float("inf")
    shares = tl.exp(outside - tl.where(some, most, 0.0))
    total = tl.sum(shares, axis=0)
    safe = tl.where(some, total, 1.0)
    place = found + row * tl.num_programs(0) + block
    plane = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    tl.store(place, most + tl.log(safe))
    extra = tl.where(in_extra, z, -float("inf"))
    most_extra = tl.max(extra, axis=0)
    any_extra = most_extra > -float("inf")
    sum_extra = tl.sum(tl.exp(extra - tl.where(any_extra, most_extra, 0.0)), axis=0)
    tl.store(place + plane, most_extra + tl.log(tl.where(any_extra, sum_extra, 1.0)))
    tl.store(place + 2 * plane, tl.sum(shares * z, axis=0) / safe)
    if ESTIMATED:
        here = estimate + row * estimate_stride + column
        e = tl.load(here, in_tail, other=0.0).to(tl.float32)
        tl.store(place + 3 * plane, tl.sum(shares * (z - e), axis=0) / safe)
    else:
        tl.store(place + 3 * plane, 0.0)
    tl.store(place + 4 * plane, tl.min(tl.where(in_tail, z, float("inf")), axis=0))
    groups = tl.max(tl.reshape(outside, (COLUMNS // GROUP, GROUP)), axis=1)
    group = block * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
    tl.store(maxima + row * num_groups + group, groups, group < num_groups)


@triton.jit
@no_type_check
def write_gradient(
    logits, bits, estimate, parts, weights, labels, num_columns, vocab_size, num_rows, stride,
    bits_stride, estimate_stride, ESTIMATED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Logits become gradients; 0 at kept columns. parts: log_tail, log_extra, gap, row by row."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    place = logits + row * stride + column
    z = tl.load(place, column < num_columns, other=0.0).to(tl.float32)
    word = tl.load(bits + row * bits_stride + column // 32, column < vocab_size, other=0)
    kept = ((word >> (column % 32)) & 1) == 1
    in_tail = (column < vocab_size) & (kept == 0)
    in_extra = (column >= vocab_size) & (column < num_columns)
    log_sum = tl.where(in_tail, tl.load(parts + row), tl.load(parts + num_rows + row))
    by_sum = tl.where(in_tail, tl.load(weights + row), tl.load(weights + num_rows + row))
    if ESTIMATED:
        e = tl.load(estimate + row * estimate_stride + column, in_tail, other=0.0).to(tl.float32)
        gap, by_gap = tl.load(parts + 2 * num_rows + row), tl.load(weights + 2 * num_rows + row)
        by_sum += tl.where(in_tail, by_gap * (z - e - gap + 1), 0.0)
    share = tl.exp(tl.where(in_tail | in_extra, z - log_sum, -float("inf")))
    gradient = by_sum * share
    is_label = (column == tl.load(labels + row)) & (kept == 0)
    gradient += tl.where(is_label, tl.load(weights + 3 * num_rows + row), 0.0)
    tl.store(place, gradient.to(logits.dtype.element_ty), column < num_columns)


def kept_bits(
    ids: Int[Tensor, "N K"], mask: Bool[Tensor, "N K"] | None, vocab_size: int
) -> Int[Tensor, "N words"]:
    """A bit for each column, set where it is kept. Masked ids are padding and repeat others."""
    bit = torch.ones_like(ids, dtype=torch.int32) << (ids % _WORD).int()
    if mask is not None:
        bit = bit * mask
    words = bit.new_zeros(len(ids), -(-vocab_size // _WORD))
    return words.scatter_add_(1, ids.long() // _WORD, bit)  # different bits: in any order


@torch.no_grad()
def read_parts(
    logits: Float[Tensor, "N W"],
    bits: Int[Tensor, "N words"],
    vocab_size: int,
    estimate: Float[Tensor, "N V"] | None = None,
) -> RowParts:
    """One pass over the logits, and one over the estimate where there is one."""
    num_rows, num_columns = logits.shape
    num_blocks = -(-num_columns // COLUMNS)
    found = logits.new_empty(5, num_rows, num_blocks, dtype=torch.float32)
    maxima = found.new_empty(num_rows, -(-vocab_size // GROUP))
    given = logits if estimate is None else estimate
    if num_rows:
        with torch.cuda.device_of(logits):
            read_rows[num_blocks, num_rows](
                logits, bits, given, found, maxima, num_columns, vocab_size, logits.stride(0),
                bits.stride(0), given.stride(0), maxima.shape[1],
                ESTIMATED=estimate is not None, COLUMNS=COLUMNS, GROUP=GROUP,
            )  # fmt: skip
    share = found[0].softmax(dim=1).nan_to_num(0.0)  # of an empty tail
    return RowParts(
        log_tail=found[0].logsumexp(dim=1),
        log_extra=found[1].logsumexp(dim=1),
        tail_mean=(share * found[2]).sum(dim=1),
        gap=(share * found[3]).sum(dim=1),
        least=found[4].amin(dim=1),
        group_maxima=maxima,
    )


def largest_of_tail(
    logits: Float[Tensor, "N W"],
    bits: Int[Tensor, "N words"],
    vocab_size: int,
    group_maxima: Float[Tensor, "N G"],
    most: int,
) -> Float[Tensor, "N C"]:
    """The largest logits of each tail, descending, from the groups with the largest maxima."""
    best = group_maxima.topk(min(most, group_maxima.shape[1]), dim=1).indices
    within = torch.arange(GROUP, device=logits.device)
    column = (best[:, :, None] * GROUP + within).flatten(1)
    outside = column >= vocab_size
    column = column.clamp(max=vocab_size - 1)
    kept = (bits.gather(1, column // _WORD) >> (column % _WORD).int()) & 1 == 1
    found = logits.gather(1, column).float().masked_fill(kept | outside, -torch.inf)
    return found.topk(min(most, vocab_size), dim=1).values


@torch.no_grad()
def replace_by_gradient(
    logits: Float[Tensor, "N W"],
    bits: Int[Tensor, "N words"],
    vocab_size: int,
    parts: RowParts,
    weights: TailWeights,
    labels: Int[Tensor, " N"],
    estimate: Float[Tensor, "N V"] | None = None,
) -> None:
    """Replaces logits by the gradient, but 0 at kept columns; a label of -1 is none."""
    num_rows, num_columns = logits.shape
    if not num_rows:
        return
    given = logits if estimate is None else estimate
    known = torch.stack([parts.log_tail, parts.log_extra, parts.gap])
    with torch.cuda.device_of(logits):
        write_gradient[-(-num_columns // COLUMNS), num_rows](
            logits, bits, given, known, torch.stack(weights), labels, num_columns, vocab_size,
            num_rows, logits.stride(0), bits.stride(0), given.stride(0),
            ESTIMATED=estimate is not None, COLUMNS=COLUMNS,
        )  # fmt: skip
