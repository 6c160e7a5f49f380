"""What a divergence asks of a student's rows beside a top-k teacher, and its answer by torch.

The kept entries, the tail's mass, a sum over the tail with an estimate of the teacher, and what
bounds look at: the tail's largest entries, its least, its mean. `DenseRows` has every log
probability at hand; `ReadRows` (read_rows.py) what kernels have found in one pass over the logits.
Promise: kept entries, mass and sums carry gradients, what bounds look at does not. Dimensions as in
schema.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

_BLOCKS = 64

Terms = Callable[[Tensor, Tensor], Tensor]
"""From (log q, log p) to the summands of a divergence, entry by entry."""


class StudentRows(ABC):
    """Rows of log-probabilities q, whose kept entries are those of a teacher."""

    log_q_kept: Float[Tensor, "P K"]
    log_q_mass: Float[Tensor, " P"]
    """Of the tail, summed over the tail itself, never 1 - kept."""

    @abstractmethod
    def outside(self, terms: Terms, log_p: Float[Tensor, "P _"]) -> Float[Tensor, " P"]:
        """The tail's summands in sum, the teacher's entries being `log_p`, which may be [P, 1]."""

    @abstractmethod
    def largest(self, most: int) -> Float[Tensor, "P C"]:
        """The tail's largest entries, descending, at most so many; minus infinity where none is."""

    @abstractmethod
    def least(self) -> Float[Tensor, " P"]:
        """The least of all entries."""

    @abstractmethod
    def surprise(self) -> Float[Tensor, " P"]:
        """The sum of q log q over the tail."""


class DenseRows(StudentRows):
    """By torch, from logits over the teacher's vocabulary, at least float32."""

    def __init__(self, logits: Float[Tensor, "P V"], ids: Int[Tensor, "P K"]) -> None:
        self._ids = ids.long()
        self._log_q = functional.log_softmax(logits, dim=1)
        self._outside = self._log_q.scatter(1, self._ids, -torch.inf)
        self.log_q_kept = self._log_q.gather(1, self._ids)
        self.log_q_mass = self._outside.logsumexp(dim=1)

    def outside(self, terms: Terms, log_p: Float[Tensor, "P _"]) -> Float[Tensor, " P"]:
        """See `StudentRows`, as below."""
        return terms(self._log_q, log_p).scatter(1, self._ids, 0.0).sum(dim=1)

    @torch.no_grad()
    def largest(self, most: int) -> Float[Tensor, "P C"]:
        """Sorts few."""
        return largest_entries(self._outside, most)

    @torch.no_grad()
    def least(self) -> Float[Tensor, " P"]:
        """Kept or not."""
        return self._log_q.amin(dim=1)

    @torch.no_grad()
    def surprise(self) -> Float[Tensor, " P"]:
        """Not above 0."""
        return (self._outside.exp() * self._log_q).sum(dim=1)


def largest_entries(values: Float[Tensor, "P V"], most: int) -> Float[Tensor, "P C"]:
    """The largest entries of each row, descending, at most so many; sorts few.

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
