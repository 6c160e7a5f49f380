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
    if not blocks:
        raise ValueError("head_loss needs at least one block of rows")
    linear = as_linear(head)
    if linear is None:
        return _called(head, blocks)
    work = _Work(linear, tuple(blocks), compute_dtype(linear))
    needed = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in work.inputs
    ]
    weights = [block.weights for block in blocks]
    values, gradients = _walk(work, weights, needed)
    with torch.no_grad():
        total = _weighted_total(values, weights)
    if any(needed):
        names = [(i, name) for i, block in enumerate(blocks) for name in block.weights]
        outputs = (total, *(values[i][name] for i, name in names))
        call = _Call(work, names, needed)
        total, *attached = _Attach.apply(call, gradients, outputs, *work.inputs)
        for (i, name), value in zip(names, attached, strict=True):
            values[i][name] = value
    return HeadLoss(total=total, values=tuple(values))


_Values = list[dict[str, Tensor]]
_Weights = Sequence[Mapping[str, Tensor]]
_Gradients = list[Tensor | None]
"""Of the head's weight and bias and of each block's states; None where none is needed."""


class _Work(NamedTuple):
    """All that a walk over the rows needs, so that it can be done again in the backward pass."""

    head: LinearHead
    blocks: tuple[HeadRows, ...]
    dtype: torch.dtype

    @property
    def inputs(self) -> list[Tensor | None]:
        return [self.head.weight, self.head.bias, *(block.hidden for block in self.blocks)]


class _Call(NamedTuple):
    work: _Work
    names: list[tuple[int, str]]
    """Block and name of every value that has a gradient."""
    needed: list[bool]

    def row_weights(self, total: Tensor | None, values: Sequence[Tensor | None]) -> _Weights:
        """What each row's value weighs when these are the gradients of total and values."""
        found: list[dict[str, Tensor]] = [{} for _ in self.work.blocks]
        for (i, name), own in zip(self.names, values, strict=True):
            weight = self.work.blocks[i].weights[name]
            weight = torch.zeros_like(weight) if total is None else weight * total
            found[i][name] = weight if own is None else weight + own
        return found


class _Attach(torch.autograd.Function):
    """Hands out what is computed already, together with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        gradients: _Gradients,
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
        gradients: _Gradients | None = ctx.gradients
        if gradients is not None and total is not None and all(v is None for v in values):
            ctx.gradients = None  # used up: scaled in place, and perhaps somebody's .grad then
            # To ask a GPU would be to wait for it; a CPU is spared a pass over the head.
            if total.device.type != "cpu" or total != 1:
                gradients = [None if g is None else g.mul_(total) for g in gradients]
        else:
            _, gradients = _walk(call.work, call.row_weights(total, values), call.needed)
        pairs = zip(gradients, inputs, strict=True)
        ours = [None if g is None or t is None else g.to(t.dtype) for g, t in pairs]
        return None, None, None, *ours


def _weighted_total(values: Sequence[Mapping[str, Tensor]], weights: _Weights) -> Tensor:
    pairs = zip(values, weights, strict=True)
    return torch.stack([(of[name] * w).sum() for of, ws in pairs for name, w in ws.items()]).sum()


@torch.no_grad()
def _walk(work: _Work, weights: _Weights, needed: Sequence[bool]) -> tuple[_Values, _Gradients]:
    """All rows, chunk by chunk: every value, and the gradients of the weighted total."""
    head, dtype = work.head, work.dtype
    weight_WD = head.weight.to(dtype)
    bias_W = None if head.bias is None else head.bias.to(dtype)
    # float16 cannot hold the gradients of 150,000 probabilities; bfloat16 can.
    product = head.weight.to(_wide(dtype)) if dtype == torch.float16 else weight_WD
    sums = _Sums(needed, work.inputs, product)
    values: _Values = []
    with torch.autocast(head.weight.device.type, enabled=False):
        for place, (block, named) in enumerate(zip(work.blocks, weights, strict=True), start=2):
            with_gradient = needed[0] or needed[1] or needed[place]
            pieces: list[dict[str, Tensor]] = []
            for chunk in even_slices(len(block.hidden), CHUNK_ROWS):
                hidden_nD = block.hidden[chunk]
                logits = functional.linear(hidden_nD.to(dtype), weight_WD, bias_W).to(product.dtype)
                here = {name: w[chunk] for name, w in named.items()} if with_gradient else {}
                pieces += _losses(block.losses(chunk), logits, head.softcap, here)
                if here:
                    sums.add(place, logits, hidden_nD, chunk)
            values.append({name: torch.cat([p[name] for p in pieces]) for name in pieces[0]})
    return values, sums.gradients


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


class _Sums:
    """Where gradients add up, in place: first that of the head's weight, its bias, then states."""

    def __init__(
        self, needed: Sequence[bool], inputs: Sequence[Tensor | None], product: Tensor
    ) -> None:
        self.product = product
        """The weight that gradients are multiplied by; its dtype is that of the products."""
        self.gradients: _Gradients = [
            torch.zeros_like(t, dtype=_wide(t.dtype)) if need and t is not None and i > 0 else None
            for i, (need, t) in enumerate(zip(needed, inputs, strict=True))
        ]
        self._weight_dtype = _wide(inputs[0].dtype) if needed[0] and inputs[0] is not None else None

    def add(self, place: int, by_logits: Tensor, hidden: Tensor, rows: slice) -> None:
        """Take in the gradient with respect to some rows' logits."""
        _, bias, *_ = self.gradients
        states = self.gradients[place]
        if bias is not None:
            bias += by_logits.sum(dim=0)
        if states is not None:
            states[rows] = by_logits @ self.product
        if self._weight_dtype is not None:
            self._add_weight(by_logits, hidden.to(by_logits.dtype), self._weight_dtype)

    def _add_weight(self, by_logits: Tensor, hidden: Tensor, dtype: torch.dtype) -> None:
        total = self.gradients[0]
        if by_logits.dtype == dtype and total is not None:
            total.addmm_(by_logits.T, hidden)
        elif by_logits.dtype == dtype:  # only now, when the first losses have made room
            self.gradients[0] = by_logits.T @ hidden
        else:
            if total is None:
                total = self.gradients[0] = torch.zeros_like(self.product, dtype=dtype)
            for start in range(0, len(total), _PRODUCT_ROWS):
                ids = slice(start, start + _PRODUCT_ROWS)
                total[ids] += by_logits[:, ids].T @ hidden


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Soft-cap logits that nobody else holds."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _through_cap(gradient: Tensor, capped: Tensor, softcap: float | None) -> Tensor:
    return gradient if softcap is None else gradient * (1 - (capped / softcap).square())


def _called(head: LogitsOf, blocks: Sequence[HeadRows]) -> HeadLoss:
    """`head_loss` for a head of which nothing is known but how to call it."""
    values = [_called_block(head, block) for block in blocks]
    total = _weighted_total(values, [block.weights for block in blocks])
    return HeadLoss(total=total, values=tuple(values))


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
