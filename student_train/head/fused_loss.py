"""Fuses the LM head with its losses: final hidden states to values and gradients, in chunks.

At V = 151,936 a row of logits takes 600 KB, and autograd keeps several of each. Here a chunk of
rows gets its logits, its losses and at once the gradient of the weighted total with respect to
these logits, which becomes gradients of states and head before the next chunk (`chunked_pass.py`):

    total = sum over blocks, names and rows of   weights[name][row] * losses.values(...)[name][row]

Promise: only one chunk's logits exist at any time, forward and backward. A weight that already
holds a gradient (a later micro-batch of a step) gets its own added in place in the backward pass.
The gradient of any other combination of the values costs a second pass over the rows. Refuses
second derivatives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from student_train.head.chunked_pass import ChunkedHeadPass, HeadRows, SavedGrads, even_slices
from student_train.head.grad_accumulation import existing_gradient, gradient_to_add_to
from student_train.head.linear_head import LinearHead, LogitsOf, as_linear
from student_train.ops.precision import at_least_float32

CALLED_ROWS = 48
"""Most rows of one call of a head that is not fused; the losses see all of them at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLoss:
    """`total` is for `backward`; `values` has each block's values by name, one per row.

    Weighted values have gradients too, for any use other than the total.
    """

    total: Float[Tensor, ""]
    values: tuple[dict[str, Float[Tensor, " _"]], ...]


def head_loss(head: LogitsOf, blocks: Sequence[HeadRows]) -> HeadLoss:
    """Values of all blocks' rows, their weighted total, and gradients where autograd is on.

    A head that `as_linear` understands is fused. Any other is called chunk by chunk, and again in
    the backward pass. The head runs in autocast's precision, the losses in float32 or wider.
    ValueError without blocks, and for a sharded head that cannot be gathered.
    """
    run = IncrementalHeadLoss(head)
    for block in blocks:
        run.add(block)
    return run.finish()


class IncrementalHeadLoss:
    """Computes `head_loss` of blocks that arrive one by one.

    All blocks share one gradient of the head, so no block adds a tensor of that size.
    """

    def __init__(self, head: LogitsOf) -> None:
        self._head = head
        linear = as_linear(head)
        self._pass = None if linear is None else _begin(linear)
        self._blocks: list[HeadRows] = []
        self._values: list[dict[str, Tensor]] = []

    def add(self, block: HeadRows) -> None:
        """Computes all values of a block now, and its gradients unless they are deferred."""
        self._blocks.append(block)
        if self._pass is None:
            self._values.append(_called_block(self._head, block))
        else:
            self._values.append(self._pass.add(block, block.weights))

    def finish(self) -> HeadLoss:
        """What `head_loss` returns; once, after the last block. ValueError without blocks."""
        if not self._blocks:
            raise ValueError("head_loss needs at least one block of rows")
        values, blocks = self._values, self._blocks
        total = _weighted_total(values, [block.weights for block in blocks])
        if self._pass is not None and any(self._pass.needed):
            names = [(i, name) for i, block in enumerate(blocks) for name in block.weights]
            outputs = (total, *(values[i][name] for i, name in names))
            call = _Call(self._pass.fresh(), blocks, names)
            total, *attached = _Attach.apply(call, self._pass, outputs, *self._pass.inputs)
            for (i, name), value in zip(names, attached, strict=True):
                values[i][name] = value
        return HeadLoss(total=total, values=tuple(values))


def _begin(head: LinearHead) -> ChunkedHeadPass:
    """A pass, with deferred gradients where the weight's can be added to an existing one."""
    grad = torch.is_grad_enabled()
    deferred = grad and head.weight.requires_grad and existing_gradient(head.weight) is not None
    return ChunkedHeadPass(head, grad, deferred=deferred)


_Weights = Sequence[Mapping[str, Tensor]]


class _Call(NamedTuple):
    """What a second pass over the rows needs."""

    blank: ChunkedHeadPass
    """A pass without blocks."""
    blocks: Sequence[HeadRows]
    names: list[tuple[int, str]]
    """Block and name of every value that has a gradient."""

    def gradients(
        self,
        total: Tensor | None,
        values: Sequence[Tensor | None],
        saved: Sequence[SavedGrads] = (),
    ) -> Sequence[Tensor | None]:
        """Gradients of all inputs, given those of total and values.

        Chunks with a saved G, which is that of the total, are not computed again.
        """
        new = self.blank.fresh(gradient_to_add_to(self.blank.head.weight))
        for i, weights in enumerate(self._row_weights(total, values)):
            if weights:
                new.add(self.blocks[i], weights, saved[i] if saved else None, total)
            else:
                new.skip(self.blocks[i])
        return new.gradients

    def _row_weights(self, total: Tensor | None, values: Sequence[Tensor | None]) -> _Weights:
        """Each row's weight in that combination; names without a gradient are absent."""
        found: list[dict[str, Tensor]] = [{} for _ in self.blocks]
        for (i, name), own in zip(self.names, values, strict=True):
            parts = [] if total is None else [self.blocks[i].weights[name] * total]
            parts += [] if own is None else [own]
            if parts:
                found[i][name] = torch.stack(parts).sum(dim=0)
        return found


class _Attach(torch.autograd.Function):
    """Returns values that are computed already, and attaches their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        done: ChunkedHeadPass,
        outputs: tuple[Tensor, ...],
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.call, ctx.done = call, done
        return outputs

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's type)
        ctx: Any, *grad_outputs: Tensor | None
    ) -> Any:
        total, *values = grad_outputs
        inputs: Sequence[Tensor | None] = ctx.saved_tensors  # raises if edited since
        call: _Call = ctx.call
        done: ChunkedHeadPass | None = None
        if total is not None and all(v is None for v in values):
            done, ctx.done = ctx.done, None  # its gradients are scaled in place: use them once
        if done is None or total is None:
            gradients = call.gradients(total, values)
        elif done.deferred:
            gradients = call.gradients(total, values, done.saved_grads)
        else:
            gradients = done.gradients
            # Comparing on a GPU would wait for it; on a CPU it saves a pass over the head.
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
            found = block.losses.chunk(chunk).values(logits, slice(None))
        return {n: v if n in block.weights else v.detach() for n, v in found.items()}

    pieces: list[dict[str, Tensor]] = [
        checkpoint(values_of, block.hidden[chunk], chunk, use_reentrant=False)
        for chunk in even_slices(len(block.hidden), CALLED_ROWS)
    ]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
