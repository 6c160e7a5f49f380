"""Rows through a linear head, chunk by chunk: logits, what is computed of them, and gradients.

    logits = hidden W^T + b     one product for a chunk of rows
    values, and G               a few rows at a time; G = d total / d logits replaces the logits
    d hidden = G W,  d W += G^T hidden,  d b += sum of G

Promise: one chunk's logits and what the losses make of them are all that exists at any time. A walk
whose gradients are `late` leaves d W and d hidden to the backward pass, because the weight's
gradient is added to one that waits there, and keeps the G of so many rows as a quarter of d W
takes; what exceeds that is computed again. Sums run in float32 or wider. n the rows of a chunk.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from student_train.head.grad_accumulation import nothing
from student_train.head.linear_head import LinearHead, compute_dtype
from student_train.ops.precision import at_least_float32
from student_train.ops.use_kernels import use_kernels

CHUNK_ROWS = 144
"""Most rows whose logits one matrix product computes."""
STEP_BYTES, GPU_STEP_BYTES = 2**22, 2**26
"""Most bytes of these logits (in float32) that the losses see at a time: they derive up to ten
tensors like it. A CPU's cache likes small steps, a GPU's queue few."""
KEPT_SHARE = 0.25
"""Most rows whose G waits for the backward pass, as a share of the width: d W has that many."""
PRODUCT_ROWS = 4096
"""Vocabulary rows whose half precision products are computed, then added up, at a time."""

RowLosses = Callable[[Tensor, slice], Mapping[str, Tensor]]
"""From logits [n, W] and which of a chunk's rows they are to named values [n] of these rows.

Logits are float32 or wider and not to be edited. What a row gets follows from its own logits.
"""
InPlaceLosses = Callable[[Tensor, Mapping[str, Tensor]], dict[str, Tensor]]
"""From a chunk's logits [n, W], as the head gives them, and weights [n] by name to named values.

If there are weights, logits become the gradient of the weighted sum.
"""
Kept = dict[int, Tensor]
"""G of chunks of one block, by their first row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRows:
    """A block of rows that go through the head, and what is computed from their logits.

    Values named in `weights` enter the total and have gradients; others are told without.
    """

    hidden: Float[Tensor, "N D"]
    losses: Callable[[slice], RowLosses]
    """Given a chunk, which are so many rows of the block, whatever computes values in the chunk."""
    weights: Mapping[str, Float[Tensor, " N"]]
    in_place: Callable[[slice], InPlaceLosses] | None = None
    """The same by kernels, where there are any for these losses."""


def even_slices(num_rows: int, most: int) -> Iterator[slice]:
    """Cut rows into slices of nearly equal length, at most so long; no rows are one empty slice."""
    num_slices = max(1, -(-num_rows // most))
    borders = [num_rows * i // num_slices for i in range(num_slices + 1)]
    for start, stop in itertools.pairwise(borders):
        yield slice(start, stop)


class Walk:
    """Blocks of rows through one head: every value, and gradients, which add up in place."""

    def __init__(self, head: LinearHead, grad: bool, *, late: bool = False) -> None:
        self.head = head
        self.dtype = compute_dtype(head)
        self.late = late
        self.kept: list[Kept] = []
        """What a late walk leaves to the backward pass, block by block."""
        self._may_keep = int(KEPT_SHARE * head.weight.shape[1])
        self._grad = grad
        self._into: Tensor | None = None
        self._head_gradients: list[Tensor | None] = [None, None]
        self._states: list[tuple[Tensor, Tensor | None]] = []

    def again(self, into: Tensor | None = None) -> "Walk":
        """A walk that has not begun, in the precision of this one; d W is added to `into`."""
        walk = Walk(self.head, self._grad)
        walk.dtype = self.dtype
        walk._into = walk._head_gradients[0] = into
        return walk

    @property
    def inputs(self) -> list[Tensor | None]:
        """The head's weight and bias, and the states of each block."""
        return [self.head.weight, self.head.bias, *(hidden for hidden, _ in self._states)]

    @property
    def needed(self) -> list[bool]:
        """Which of the inputs have gradients."""
        return [self._needs(tensor) for tensor in self.inputs]

    @property
    def gradients(self) -> list[Tensor | None]:
        """Of the inputs, as far as blocks were added; None where none is needed or all are late."""
        weight, bias = self._head_gradients
        weight = weight if self._into is None else nothing(self._into)
        return [weight, bias, *(gradient for _, gradient in self._states)]

    def _needs(self, tensor: Tensor | None) -> bool:
        return self._grad and tensor is not None and tensor.requires_grad

    def skip(self, block: HeadRows) -> Tensor | None:
        """Take note of a block; its states' gradient, where it has one, is zero so far."""
        needed = self._needs(block.hidden) and not self.late
        by_states = _zeros(block.hidden) if needed else None
        self._states.append((block.hidden, by_states))
        return by_states

    @torch.no_grad()
    def add(
        self,
        block: HeadRows,
        weights: Mapping[str, Tensor],
        kept: Kept | None = None,
        factor: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Every value of a block, whose rows have these weights in the total.

        The G of chunks that were kept is used up, times the factor; there are no values of those.
        """
        head, dtype = self.head, self.dtype
        by_states = self.skip(block)
        with_gradient = any(map(self._needs, (head.weight, head.bias, block.hidden)))
        weight_WD = head.weight.to(dtype)
        bias_W = None if head.bias is None else head.bias.to(dtype)
        # float16 cannot hold the gradients of 150,000 probabilities; bfloat16 can.
        product = head.weight.to(_wide(dtype)) if dtype == torch.float16 else weight_WD
        pieces: list[dict[str, Tensor]] = []
        in_place = block.in_place if head.softcap is None and use_kernels(product) else None
        known, keeping = kept or {}, Kept()
        with torch.autocast(head.weight.device.type, enabled=False):
            for chunk in even_slices(len(block.hidden), CHUNK_ROWS):
                hidden_nD = block.hidden[chunk]
                logits, times = known.pop(chunk.start, None), factor
                if logits is None:
                    logits = functional.linear(hidden_nD.to(dtype), weight_WD, bias_W)
                    logits, times = logits.to(product.dtype), None
                    wanted = self._keeps(len(hidden_nD)) if self.late else with_gradient
                    here = {name: w[chunk] for name, w in weights.items()} if wanted else {}
                    if in_place is not None:
                        pieces.append(in_place(chunk)(logits, here))
                    else:
                        pieces += _losses(block.losses(chunk), logits, head.softcap, here)
                    if here and self.late:
                        keeping[chunk.start] = logits
                    if not here or self.late:
                        continue
                if by_states is not None:
                    by_states[chunk] = _times(logits @ product, times)
                self._add_head(logits, hidden_nD.to(logits.dtype), times)
        self.kept.append(keeping)
        return {name: torch.cat([piece[name] for piece in pieces]) for name in (pieces or [{}])[0]}

    def _keeps(self, num_rows: int) -> bool:
        """Whether G of so many more rows may wait; if so, there is room for fewer."""
        fits = num_rows <= self._may_keep
        self._may_keep -= num_rows if fits else 0
        return fits

    def _add_head(self, by_logits: Tensor, hidden: Tensor, factor: Tensor | None) -> None:
        head = self.head
        weight, bias = self._head_gradients
        if head.bias is not None and self._needs(head.bias):
            bias = _zeros(head.bias) if bias is None else bias
            bias += _times(by_logits.sum(dim=0), factor)
        if self._needs(head.weight):
            dtype = _wide(head.weight.dtype)
            weight = _add_product(weight, by_logits, hidden, dtype, factor)
        self._head_gradients = [weight, bias]


def _add_product(
    total: Tensor | None,
    by_logits: Tensor,
    hidden: Tensor,
    dtype: torch.dtype,
    factor: Tensor | None,
) -> Tensor:
    """total + factor by_logits^T hidden, in place where there is a total."""
    if by_logits.dtype == dtype:  # only now, when the first losses have made room
        hidden = _times(hidden, factor)
        return by_logits.T @ hidden if total is None else total.addmm_(by_logits.T, hidden)
    if total is None:
        total = hidden.new_zeros(by_logits.shape[1], hidden.shape[1], dtype=dtype)
    for start in range(0, len(total), PRODUCT_ROWS):
        ids = slice(start, start + PRODUCT_ROWS)
        total[ids] += _times(by_logits[:, ids].T @ hidden, factor)
    return total


def _times(tensor: Tensor, factor: Tensor | None) -> Tensor:
    """In float32 or wider if there is a factor."""
    return tensor if factor is None else tensor.to(_wide(tensor.dtype)) * factor


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=_wide(like.dtype))


def _losses(
    losses: RowLosses, logits: Tensor, softcap: float | None, weights: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """The values of a chunk's rows, a few at a time. If there are weights, logits become gradients.

    Writing the gradient of the weighted sum where the logits were halves what a chunk takes.
    """
    for rows in even_slices(len(logits), _step_rows(logits)):
        with torch.set_grad_enabled(bool(weights)):
            leaf = _capped(at_least_float32(logits[rows]), softcap).requires_grad_(bool(weights))
            found = losses(leaf, rows)
        values = {name: value.detach().clone() for name, value in found.items()}
        if weights:
            weighted = [found[name] for name in weights]
            incoming = [w[rows].to(found[name].dtype) for name, w in weights.items()]
            (gradient,) = torch.autograd.grad(weighted, leaf, incoming)
            logits[rows] = _through_cap(gradient, leaf.detach(), softcap)
        yield values


def _step_rows(logits: Tensor) -> int:
    most = STEP_BYTES if logits.device.type == "cpu" else GPU_STEP_BYTES
    return max(1, most // (4 * max(1, logits.shape[1])))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Soft-cap logits that nobody else holds."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _through_cap(gradient: Tensor, capped: Tensor, softcap: float | None) -> Tensor:
    return gradient if softcap is None else gradient * (1 - (capped / softcap).square())
