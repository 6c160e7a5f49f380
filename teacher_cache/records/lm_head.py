"""Defines the LM head as data: the weights that turn a final hidden state into logits.

Hidden-tier caches store it once beside the shards, so that a student's process can compute every
teacher logit without the teacher. Only plain affine heads qualify; teacher/plain_head.py checks
this against the model's own logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from teacher_cache.schema.tensor_record import TensorRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class LmHead(TensorRecord):
    """Weight [V, D] and optional bias [V], restricted to the shared vocabulary rows."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None

    @property
    def vocab_size(self) -> int:
        """Number of vocabulary rows."""
        return self.weight.shape[0]

    def logits(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Raw logits in the dtype of the head."""
        return functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    def logits_at(self, hidden: Float[Tensor, "N D"], ids: Tensor) -> Float[Tensor, "N K"]:
        """Raw logits at the vocabulary rows `ids` only, shape [N, len(ids)]."""
        bias = None if self.bias is None else self.bias[ids]
        return functional.linear(hidden.to(self.weight.dtype), self.weight[ids], bias)


MAX_LOGITS = 2**25
"""Most logits held at once (128 MiB in float32)."""


def row_chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of rows with at most `MAX_LOGITS` logits each, but at least one row."""
    step = max(1, MAX_LOGITS // max(1, vocab_size))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
