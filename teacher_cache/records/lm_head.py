"""Defines the LM head as data: the weights that turn a final hidden state into logits.

Hidden-tier caches store it once beside the shards, so that a student's process can compute every
teacher logit without the teacher. Only plain affine heads qualify; teacher/plain_head.py checks
this against the model's own logits.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from teacher_cache.schema.fingerprint import digest_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class LmHead:
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

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        stored = {"weight": self.weight}
        return stored if self.bias is None else {**stored, "bias": self.bias}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "LmHead":
        """The inverse of `tensors`."""
        return cls(weight=tensors["weight"], bias=tensors.get("bias"))

    def to(self, device: torch.device) -> "LmHead":
        """The same head on another device."""
        return LmHead.from_tensors({name: each.to(device) for name, each in self.tensors().items()})

    @property
    def digest(self) -> str:
        """Content digest of weight and bias."""
        return digest_tensors(self.tensors().items())


MAX_LOGITS = 2**25
"""Most logits held at once (128 MiB in float32)."""


def row_chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of rows with at most `MAX_LOGITS` logits each, but at least one row."""
    step = max(1, MAX_LOGITS // max(1, vocab_size))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
