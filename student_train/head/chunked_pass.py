"""Passes rows through a linear head in chunks: logits, losses and gradients of each chunk.

    logits = hidden W^T + b     one product for a chunk of rows
    losses, and G               a few rows at a time; G = d total / d logits replaces the logits
    d hidden = G W,  d W += G^T hidden,  d b += sum of G

Promise: only one chunk's logits exist at any time. A pass with `deferred` gradients leaves d W and
d hidden to the backward pass, where d W is added to the weight's existing gradient. It saves G for
as many rows as fit in a quarter of d W's memory; the other rows are computed again. Sums run in
float32 or wider. n is the number of rows of a chunk.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from student_train.head.grad_accumulation import empty_gradient
from student_train.head.linear_head import LinearHead, compute_dtype
from student_train.ops.precision import at_least_float32
from student_train.ops.use_kernels import use_kernels

CHUNK_ROWS = 144
"""Most rows whose logits one matrix product computes."""
STEP_BYTES, GPU_STEP_BYTES = 2**22, 2**26
"""Most bytes of these logits (in float32) that the losses see at a time; they derive up to ten
tensors of that size. Small steps stay in a CPU's cache; few steps keep a GPU's queue full."""
SAVED_SHARE = 0.25
"""Most rows whose G is saved for the backward pass, as a share of the width: d W has that many."""
PRODUCT_ROWS = 4096
"""Vocabulary rows whose half precision products are computed, then added up, at a time."""

SavedGrads = dict[int, Tensor]
"""G of chunks of one block, by their first row."""


class RowLosses(ABC):
    """Losses of rows of logits. What a row gets follows from its own logits."""

    @property
    def has_kernels(self) -> bool:
        """Whether `values_in_place` is there, for use on a GPU."""
        return False

    @abstractmethod
    def chunk(self, rows: slice) -> "RowLosses":
        """The losses of some rows of the block; work shared by these rows is done here, once."""

    @abstractmethod
    def values(self, logits: Float[Tensor, "n W"], rows: slice) -> Mapping[str, Tensor]:
        """Named values [n] of these rows of the chunk.

        Logits are float32 or wider and are not edited.
        """

    def values_in_place(
        self, logits: Float[Tensor, "n W"], weights: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Named values of all rows of the chunk, by kernels; logits are as the head gives them.

        With weights [n] by name, logits become the gradient of the weighted sum.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRows:
    """A block of rows that go through the head, and the losses of their logits.

    Values named in `weights` enter the total and have gradients; other values have none.
    """

    hidden: Float[Tensor, "N D"]
    losses: RowLosses
    weights: Mapping[str, Float[Tensor, " N"]]


def even_slices(num_rows: int, most: int) -> Iterator[slice]:
    """Slices of nearly equal length, at most `most`; one empty slice where there are no rows."""
    num_slices = max(1, -(-num_rows // most))
    borders = [num_rows * i // num_slices for i in range(num_slices + 1)]
    for start, stop in itertools.pairwise(borders):
        yield slice(start, stop)


class ChunkedHeadPass:
    """Passes blocks of rows through one head: all values, and gradients added up in place."""

    def __init__(self, head: LinearHead, grad: bool, *, deferred: bool = False) -> None:
        self.head = head
        self.dtype = compute_dtype(head)
        self.deferred = deferred
        self.saved_grads: list[SavedGrads] = []
        """What a deferred pass saves for the backward pass, block by block."""
        self._rows_to_save = int(SAVED_SHARE * head.weight.shape[1])
        self._grad = grad
        self._into: Tensor | None = None
        self._head_gradients: list[Tensor | None] = [None, None]
        self._states: list[tuple[Tensor, Tensor | None]] = []

    def fresh(self, into: Tensor | None = None) -> "ChunkedHeadPass":
        """A new pass in the precision of this one; it adds d W to `into`."""
        new = ChunkedHeadPass(self.head, self._grad)
        new.dtype = self.dtype
        new._into = new._head_gradients[0] = into
        return new

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
        """Of the inputs, from the blocks added so far; None where not needed, or deferred."""
        weight, bias = self._head_gradients
        weight = weight if self._into is None else empty_gradient(self._into)
        return [weight, bias, *(gradient for _, gradient in self._states)]

    def _needs(self, tensor: Tensor | None) -> bool:
        return self._grad and tensor is not None and tensor.requires_grad

    def skip(self, block: HeadRows) -> Tensor | None:
        """Registers a block, not computed; returns its states' gradient, zero so far, if any."""
        needed = self._needs(block.hidden) and not self.deferred
        by_states = _zeros(block.hidden) if needed else None
        self._states.append((block.hidden, by_states))
        return by_states

    @torch.no_grad()
    def add(
        self,
        block: HeadRows,
        weights: Mapping[str, Tensor],
        saved: SavedGrads | None = None,
        factor: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """All values of a block, whose rows have these weights in the total.

        Chunks with a saved G take it, times the factor, and return no values.
        """
        head, dtype = self.head, self.dtype
        by_states = self.skip(block)
        with_gradient = any(map(self._needs, (head.weight, head.bias, block.hidden)))
        weight_WD = head.weight.to(dtype)
        bias_W = None if head.bias is None else head.bias.to(dtype)
        # float16 cannot hold the gradients of 150,000 probabilities; bfloat16 can.
        product = head.weight.to(_wide(dtype)) if dtype == torch.float16 else weight_WD
        pieces: list[dict[str, Tensor]] = []
        in_place = block.losses.has_kernels and head.softcap is None and use_kernels(product)
        saved, saving = saved or {}, SavedGrads()
        with torch.autocast(head.weight.device.type, enabled=False):
            for chunk in even_slices(len(block.hidden), CHUNK_ROWS):
                hidden_nD = block.hidden[chunk]
                logits, times = saved.pop(chunk.start, None), factor
                if logits is None:
                    logits = functional.linear(hidden_nD.to(dtype), weight_WD, bias_W)
                    logits, times = logits.to(product.dtype), None
                    wanted = self._may_save(len(hidden_nD)) if self.deferred else with_gradient
                    here = {name: w[chunk] for name, w in weights.items()} if wanted else {}
                    losses = block.losses.chunk(chunk)
                    if in_place:
                        pieces.append(dict(losses.values_in_place(logits, here)))
                    else:
                        pieces += _step_by_step(losses, logits, head.softcap, here)
                    if here and self.deferred:
                        saving[chunk.start] = logits
                    if not here or self.deferred:
                        continue
                if by_states is not None:
                    by_states[chunk] = _times(logits @ product, times)
                self._add_head(logits, hidden_nD.to(logits.dtype), times)
        self.saved_grads.append(saving)
        return {name: torch.cat([piece[name] for piece in pieces]) for name in (pieces or [{}])[0]}

    def _may_save(self, num_rows: int) -> bool:
        """Whether G of this many more rows fits; if so, their room is taken."""
        fits = num_rows <= self._rows_to_save
        self._rows_to_save -= num_rows if fits else 0
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
    if by_logits.dtype == dtype:  # made only now, when the first losses are gone
        hidden = _times(hidden, factor)
        return by_logits.T @ hidden if total is None else total.addmm_(by_logits.T, hidden)
    if total is None:
        total = hidden.new_zeros(by_logits.shape[1], hidden.shape[1], dtype=dtype)
    for start in range(0, len(total), PRODUCT_ROWS):
        ids = slice(start, start + PRODUCT_ROWS)
        total[ids] += _times(by_logits[:, ids].T @ hidden, factor)
    return total


def _times(tensor: Tensor, factor: Tensor | None) -> Tensor:
    """The product with the factor, in float32 or wider; the tensor itself without one."""
    return tensor if factor is None else tensor.to(_wide(tensor.dtype)) * factor


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=_wide(like.dtype))


def _step_by_step(
    losses: RowLosses, logits: Tensor, softcap: float | None, weights: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Values of a chunk's rows, a few rows at a time. With weights, logits become gradients.

    Writing the gradient of the weighted sum over the logits halves a chunk's memory.
    """
    for rows in even_slices(len(logits), _step_rows(logits)):
        with torch.set_grad_enabled(bool(weights)):
            leaf = _capped(at_least_float32(logits[rows]), softcap).requires_grad_(bool(weights))
            found = losses.values(leaf, rows)
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
    """Soft-caps logits in place."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _through_cap(gradient: Tensor, capped: Tensor, softcap: float | None) -> Tensor:
    return gradient if softcap is None else gradient * (1 - (capped / softcap).square())
