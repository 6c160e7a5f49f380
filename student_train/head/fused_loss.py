"""LM head and loss in one: from final hidden states to values and gradients, chunk by chunk.

Logits are by far the largest tensors of a distillation step: at V = 151,936 a row takes 600 KB,
and autograd keeps several of each. Here a chunk of rows gets its logits, its losses and at once
the gradient of the weighted total with respect to these logits, which is reduced to gradients of
states and head before the next chunk begins (`head_walk.py`):

    total = sum over blocks, names and rows of   weights[name][row] * losses(logits)[name][row]

Promise: one chunk's logits and what the losses make of them are all that exists at any time, in
the forward pass and in the backward. A weight that holds a gradient already (a later micro-batch of
a step) gets its own added in the backward pass, in place. The weights of rows have to be known
beforehand; a gradient of any other combination of the values costs a second walk over the rows.
Refuses second derivatives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from student_train.head.chunked_pass import HeadRows, Kept, Walk, even_slices
from student_train.head.grad_accumulation import gradient_that_waits, gradient_to_add_to
from student_train.head.linear_head import LinearHead, LogitsOf, as_linear
from student_train.ops.precision import at_least_float32

CALLED_ROWS = 48
"""Most rows of one call of a head that is not fused; the losses see these all at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLoss:
    """`total` is made for `backward`; `values` are those of each block, by name, row by row.

    Weighted values have gradients as well, for any use but the total.
    """

    total: Float[Tensor, ""]
    values: tuple[dict[str, Float[Tensor, " _"]], ...]


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
        self._walk = None if linear is None else _begin(linear)
        self._blocks: list[HeadRows] = []
        self._values: list[dict[str, Tensor]] = []

    def add(self, block: HeadRows) -> None:
        """Compute all values of a block now, and gradients unless the weight's is to wait."""
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
            total, *attached = _Attach.apply(call, self._walk, outputs, *self._walk.inputs)
            for (i, name), value in zip(names, attached, strict=True):
                values[i][name] = value
        return HeadLoss(total=total, values=tuple(values))


def _begin(head: LinearHead) -> Walk:
    """A walk whose gradients are late where the weight's can be added to one that waits for it."""
    grad = torch.is_grad_enabled()
    late = grad and head.weight.requires_grad and gradient_that_waits(head.weight) is not None
    return Walk(head, grad, late=late)


_Weights = Sequence[Mapping[str, Tensor]]


class _Call(NamedTuple):
    """All that a second walk over the rows needs."""

    walk: Walk
    blocks: Sequence[HeadRows]
    names: list[tuple[int, str]]
    """Block and name of every value that has a gradient."""

    def gradients(
        self, total: Tensor | None, values: Sequence[Tensor | None], kept: Sequence[Kept] = ()
    ) -> Sequence[Tensor | None]:
        """Of all inputs, if these are the gradients of total and values.

        Computed anew but for the chunks that were kept, whose gradients are those of the total.
        """
        walk = self.walk.again(gradient_to_add_to(self.walk.head.weight))
        for i, weights in enumerate(self._row_weights(total, values)):
            if weights:
                walk.add(self.blocks[i], weights, kept[i] if kept else None, total)
            else:
                walk.skip(self.blocks[i])
        return walk.gradients

    def _row_weights(self, total: Tensor | None, values: Sequence[Tensor | None]) -> _Weights:
        """What each row's value weighs then. Nothing is named that has no part in it."""
        found: list[dict[str, Tensor]] = [{} for _ in self.blocks]
        for (i, name), own in zip(self.names, values, strict=True):
            parts = [] if total is None else [self.blocks[i].weights[name] * total]
            parts += [] if own is None else [own]
            if parts:
                found[i][name] = torch.stack(parts).sum(dim=0)
        return found


class _Attach(torch.autograd.Function):
    """Hands out what is computed already, together with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, walk: Walk, outputs: tuple[Tensor, ...], *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.call, ctx.walk = call, walk
        return outputs

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's type)
        ctx: Any, *grad_outputs: Tensor | None
    ) -> Any:
        total, *values = grad_outputs
        inputs: Sequence[Tensor | None] = ctx.saved_tensors  # raises if edited in the meantime
        call: _Call = ctx.call
        walk: Walk | None = None
        if total is not None and all(v is None for v in values):
            walk, ctx.walk = ctx.walk, None  # used up: scaled in place, perhaps somebody's .grad
        if walk is None or total is None:
            gradients = call.gradients(total, values)
        elif walk.late:
            gradients = call.gradients(total, values, walk.kept)
        else:
            gradients = walk.gradients
            # To ask a GPU would be to wait for it; a CPU is spared a pass over the head.
            if total.device.type != "cpu" or total != 1:
                gradients = [None if g is None else g.mul_(total) for g in gradients]
        pairs = zip(gradients, inputs, strict=True)
        ours = [None if g is None or t is None else g.to(t.dtype) for g, t in pairs]
        return None, None, None, *ours


def _weighted_total(values: Sequence[Mapping[str, Tensor]], weights: _Weights) -> Tensor:
    pairs = zip(values, weights, strict=True)
    return torch.stack([(of[name] * w).sum() for of, ws in pairs for name, w in ws.items()]).sum()


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
