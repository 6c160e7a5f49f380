"""The student's log-probabilities, as a divergence from a top-k teacher needs them.

`DenseRows` computes every log-probability with torch. `KernelRows` (kernel_rows.py) has what
kernels found in one pass over the logits. Promise: kept entries, mass and sums carry gradients;
what bounds need does not. Dimensions as in teacher_output.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

_BLOCKS = 64

Summands = Callable[[Tensor, Tensor], Tensor]
"""From (log q, log p) to the summands of a divergence, entry by entry."""


class StudentRows(ABC):
    """Rows of log-probabilities q beside a teacher that keeps K entries of each."""

    log_q_kept: Float[Tensor, "P K"]
    log_q_mass: Float[Tensor, " P"]
    """Of the tail, summed over the tail itself, never 1 - kept."""

    @abstractmethod
    def tail_sum(self, summands: Summands, log_p: Float[Tensor, "P _"]) -> Float[Tensor, " P"]:
        """Sum of the summands over the tail; the teacher's entries `log_p` are [P, V] or [P, 1]."""

    @abstractmethod
    def tail_largest(self, most: int) -> Float[Tensor, "P C"]:
        """The tail's largest log q, at most `most`, descending; minus infinity beyond its end."""

    @abstractmethod
    def min_log_q(self) -> Float[Tensor, " P"]:
        """The smallest log q of all entries, kept or not."""

    @abstractmethod
    def tail_neg_entropy(self) -> Float[Tensor, " P"]:
        """The sum of q log q over the tail; at most 0."""


class DenseRows(StudentRows):
    """Computes with torch, from logits over the teacher's vocabulary in float32 or wider."""

    def __init__(self, logits: Float[Tensor, "P V"], ids: Int[Tensor, "P K"]) -> None:
        self._ids = ids.long()
        self._log_q = functional.log_softmax(logits, dim=1)
        self._tail = self._log_q.scatter(1, self._ids, -torch.inf)
        self.log_q_kept = self._log_q.gather(1, self._ids)
        self.log_q_mass = self._tail.logsumexp(dim=1)

    def tail_sum(self, summands: Summands, log_p: Float[Tensor, "P _"]) -> Float[Tensor, " P"]:
        """See `StudentRows`, as below."""
        return summands(self._log_q, log_p).scatter(1, self._ids, 0.0).sum(dim=1)

    @torch.no_grad()
    def tail_largest(self, most: int) -> Float[Tensor, "P C"]:
        """By `largest_entries`."""
        return largest_entries(self._tail, most)

    @torch.no_grad()
    def min_log_q(self) -> Float[Tensor, " P"]:
        """One pass."""
        return self._log_q.amin(dim=1)

    @torch.no_grad()
    def tail_neg_entropy(self) -> Float[Tensor, " P"]:
        """One pass."""
        return (self._tail.exp() * self._log_q).sum(dim=1)


def largest_entries(values: Float[Tensor, "P V"], most: int) -> Float[Tensor, "P C"]:
    """The largest entries of each row, at most `most`, descending, without sorting the row.

    They lie in the blocks with the largest maxima, which one fast pass finds.
    """
    num_strides = values.shape[1] // _BLOCKS
    if num_strides <= most:
        return values.topk(min(most, values.shape[1]), dim=1).values
    cut = num_strides * _BLOCKS
    blocks = values[:, :cut].unflatten(1, (_BLOCKS, num_strides))
    best = blocks.amax(dim=1).topk(most, dim=1).indices
    found = blocks.gather(2, best[:, None, :].expand(-1, _BLOCKS, -1)).flatten(1)
    return torch.cat([found, values[:, cut:]], dim=1).topk(most, dim=1).values
