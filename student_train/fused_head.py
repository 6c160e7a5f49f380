"""LM head and loss in one: from final hidden states to values and gradients, chunk by chunk.

Logits are by far the largest tensors of a distillation step: at V = 151,936 a row takes 600 KB,
and autograd keeps several of each. Here a chunk of rows gets its logits, its losses and at once
the gradient of the weighted total with respect to these logits, which is reduced to gradients of
states and head before the next chunk begins:

    total = sum over blocks, names and rows of   weights[name][row] * losses(logits)[name][row]

Promise: one chunk's logits and what the losses make of them are all that exists at any time, in
the forward pass and in the backward. The weights have to be known beforehand; a gradient of any
other combination of the values costs a second walk over the rows. Sums run in float32 or wider.
Refuses second derivatives. Dimensions as in schema.py, n the rows of a chunk.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from student_train.linear_head import LinearHead, LogitsOf, as_linear, compute_dtype
from student_train.top_k_signal import at_least_float32

CHUNK_ROWS = 144
"""Most rows whose logits one matrix product computes."""
STEP_BYTES, GPU_STEP_BYTES = 2**22, 2**26
"""Most bytes of these logits (in float32) that the losses see at a time: they derive up to ten
tensors like it. A CPU's cache likes small steps, a GPU's queue few."""
CALLED_ROWS = 48
"""Most rows of one call of a head that is not fused; the losses see these all at once."""
_PRODUCT_ROWS = 4096
"""Vocabulary rows whose half precision products are computed, then added up, at a time."""

RowLosses = Callable[[Tensor, slice], Mapping[str, Tensor]]
"""From logits [n, W] and which of a chunk's rows they are to named values [n] of these rows.

Logits are float32 or wider and not to be edited. What a row gets follows from its own logits.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRows:
    """A block of rows that go through the head, and what is computed from their logits.

    Values named in `weights` enter the total and have gradients; others are told without.
    """

    hidden: Float[Tensor, "N D"]
    losses: Callable[[slice], RowLosses]
    """Given a chunk, which are so many rows of the block, whatever computes values in the chunk."""
    weights: Mapping[str, Float[Tensor, " N"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLoss:
    """`total` is made for `backward`; `values` are those of each block, by name, row by row.

    Weighted values have gradients as well, for any use but the total.
    """

    total: Float[Tensor, ""]
    values: tuple[dict[str, Float[Tensor, " _"]], ...]


def even_slices(num_rows: int, most: int) -> Iterator[slice]:
    """Cut rows into slices of nearly equal length, at most so long; no rows are one empty slice."""
    num_slices = max(1, -(-num_rows // most))
    borders = [num_rows * i // num_slices for i in range(num_slices + 1)]
    for start, stop in itertools.pairwise(borders):
        yield slice(start, stop)


def head_loss(head: LogitsOf, blocks: Sequence[HeadRows]) -> HeadLoss:
    """Values of every block's rows, their weighted total, and gradients where autograd is on.

    A head that `as_linear` takes apart is fused; any other is called chunk by chunk, and again in
    the backward pass. It runs in autocast's precision, the losses in float32 or wider.
    ValueError without blocks, and for a sharded head that cannot be gathered.
    """
    run = HeadPass(head)
    for block in blocks:
        run.add(block)
    return run.finish()


class HeadPass:
    """`head_loss` of blocks that come one by one: the last may follow from what the first waited
    for. They share one gradient of the head, so that no block adds a tensor of its size.
    """

    def __init__(self, head: LogitsOf) -> None:
        self._head = head
        linear = as_linear(head)
        self._walk = None if linear is None else _Walk(linear, torch.is_grad_enabled())
        self._blocks: list[HeadRows] = []
        self._values: list[dict[str, Tensor]] = []

    def add(self, block: HeadRows) -> None:
        """Compute all values and gradients of a block now."""
        self._blocks.append(block)
        if self._walk is None:
            self._values.append(_called_block(self._head, block))
        else:
            self._values.append(self._walk.add(block, block.weights))

    def finish(self) -> HeadLoss:
        """What `head_loss` returns; once, after the last block. ValueError without blocks."""
        if not self._blocks:
            raise ValueError("head_loss needs at least one block of rows")
        values, blocks = self._values, self._blocks
        total = _weighted_total(values, [block.weights for block in blocks])
        if self._walk is not None and any(self._walk.needed):
            names = [(i, name) for i, block in enumerate(blocks) for name in block.weights]
            outputs = (total, *(values[i][name] for i, name in names))
            call = _Call(self._walk.again(), blocks, names)
            gradients, inputs = self._walk.gradients, self._walk.inputs
            total, *attached = _Attach.apply(call, gradients, outputs, *inputs)
            for (i, name), value in zip(names, attached, strict=True):
                values[i][name] = value
        return HeadLoss(total=total, values=tuple(values))


_Weights = Sequence[Mapping[str, Tensor]]


class _Call(NamedTuple):
    """All that a second walk over the rows needs."""

    walk: "_Walk"
    blocks: Sequence[HeadRows]
    names: list[tuple[int, str]]
    """Block and name of every value that has a gradient."""

    def row_weights(self, total: Tensor | None, values: Sequence[Tensor | None]) -> _Weights:
        """What each row's value weighs when these are the gradients of total and values.

        Nothing is named that has no part in it.
        """
        found: list[dict[str, Tensor]] = [{} for _ in self.blocks]
        for (i, name), own in zip(self.names, values, strict=True):
            parts = [] if total is None else [self.blocks[i].weights[name] * total]
            parts += [] if own is None else [own]
            if parts:
                found[i][name] = torch.stack(parts).sum(dim=0)
        return found

    def gradients(self, weights: _Weights) -> Sequence[Tensor | None]:
        """Of the total that these weights make, computed anew."""
        walk = self.walk.again()
        for block, named in zip(self.blocks, weights, strict=True):
            _ = walk.add(block, named) if named else walk.skip(block)
        return walk.gradients


class _Attach(torch.autograd.Function):
    """Hands out what is computed already, together with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        gradients: Sequence[Tensor | None],
        outputs: tuple[Tensor, ...],
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.call, ctx.gradients = call, gradients
        return outputs

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's type)
        ctx: Any, *grad_outputs: Tensor | None
    ) -> Any:
        total, *values = grad_outputs
        inputs: Sequence[Tensor | None] = ctx.saved_tensors  # raises if edited in the meantime
        call: _Call = ctx.call
        gradients: Sequence[Tensor | None] | None = ctx.gradients
        if gradients is not None and total is not None and all(v is None for v in values):
            ctx.gradients = None  # used up: scaled in place, and perhaps somebody's .grad then
            # To ask a GPU would be to wait for it; a CPU is spared a pass over the head.
            if total.device.type != "cpu" or total != 1:
                gradients = [None if g is None else g.mul_(total) for g in gradients]
        else:
            gradients = call.gradients(call.row_weights(total, values))
        pairs = zip(gradients, inputs, strict=True)
        ours = [None if g is None or t is None else g.to(t.dtype) for g, t in pairs]
        return None, None, None, *ours


def _weighted_total(values: Sequence[Mapping[str, Tensor]], weights: _Weights) -> Tensor:
    pairs = zip(values, weights, strict=True)
    return torch.stack([(of[name] * w).sum() for of, ws in pairs for name, w in ws.items()]).sum()


class _Walk:
    """Rows through a head, chunk by chunk: every value, and gradients, which add up in place."""

    def __init__(self, head: LinearHead, grad: bool) -> None:
        self.head = head
        self.dtype = compute_dtype(head)
        self._grad = grad
        self._head_gradients: list[Tensor | None] = [None, None]
        self._states: list[tuple[Tensor, Tensor | None]] = []

    def again(self) -> "_Walk":
        """A walk of the same kind that has not begun, in the precision of this one."""
        walk = _Walk(self.head, self._grad)
        walk.dtype = self.dtype
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
        """Of the inputs, as far as blocks were added; None where none is needed."""
        return [*self._head_gradients, *(gradient for _, gradient in self._states)]

    def _needs(self, tensor: Tensor | None) -> bool:
        return self._grad and tensor is not None and tensor.requires_grad

    def skip(self, block: HeadRows) -> Tensor | None:
        """Take note of a block; its states' gradient, where it has one, is zero so far."""
        by_states = _zeros(block.hidden) if self._needs(block.hidden) else None
        self._states.append((block.hidden, by_states))
        return by_states

    @torch.no_grad()
    def add(self, block: HeadRows, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every value of a block, whose rows have these weights in the total."""
        head, dtype = self.head, self.dtype
        by_states = self.skip(block)
        with_gradient = any(map(self._needs, (head.weight, head.bias, block.hidden)))
        weight_WD = head.weight.to(dtype)
        bias_W = None if head.bias is None else head.bias.to(dtype)
        # float16 cannot hold the gradients of 150,000 probabilities; bfloat16 can.
        product = head.weight.to(_wide(dtype)) if dtype == torch.float16 else weight_WD
        pieces: list[dict[str, Tensor]] = []
        with torch.autocast(head.weight.device.type, enabled=False):
            for chunk in even_slices(len(block.hidden), CHUNK_ROWS):
                hidden_nD = block.hidden[chunk]
                logits = functional.linear(hidden_nD.to(dtype), weight_WD, bias_W).to(product.dtype)
                here = {name: w[chunk] for name, w in weights.items()} if with_gradient else {}
                pieces += _losses(block.losses(chunk), logits, head.softcap, here)
                if not here:
                    continue
                if by_states is not None:
                    by_states[chunk] = logits @ product
                self._add_head(logits, hidden_nD.to(logits.dtype))
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def _add_head(self, by_logits: Tensor, hidden: Tensor) -> None:
        head = self.head
        weight, bias = self._head_gradients
        if head.bias is not None and self._needs(head.bias):
            bias = _zeros(head.bias) if bias is None else bias
            bias += by_logits.sum(dim=0)
        if self._needs(head.weight):
            weight = _add_product(weight, by_logits, hidden, _wide(head.weight.dtype))
        self._head_gradients = [weight, bias]


def _add_product(
    total: Tensor | None, by_logits: Tensor, hidden: Tensor, dtype: torch.dtype
) -> Tensor:
    """total + by_logits^T hidden, in place where there is a total."""
    if by_logits.dtype == dtype:  # only now, when the first losses have made room
        return by_logits.T @ hidden if total is None else total.addmm_(by_logits.T, hidden)
    if total is None:
        total = hidden.new_zeros(by_logits.shape[1], hidden.shape[1], dtype=dtype)
    for start in range(0, len(total), _PRODUCT_ROWS):
        ids = slice(start, start + _PRODUCT_ROWS)
        total[ids] += by_logits[:, ids].T @ hidden
    return total


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


def _called_block(head: LogitsOf, block: HeadRows) -> dict[str, Tensor]:
    def values_of(hidden: Tensor, chunk: slice) -> dict[str, Tensor]:
        logits = at_least_float32(head(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            found = block.losses(chunk)(logits, slice(None))
        return {n: v if n in block.weights else v.detach() for n, v in found.items()}

    pieces: list[dict[str, Tensor]] = [
        checkpoint(values_of, block.hidden[chunk], chunk, use_reentrant=False)
        for chunk in even_slices(len(block.hidden), CALLED_ROWS)
    ]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
