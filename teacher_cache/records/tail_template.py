"""Fits the tail template: one shape over all V rows for the mass outside top-k records.

A record has the mass tau outside its K entries, but not how it is distributed. The template is the
mean over calibration positions of

    min(p_v, c, tau) / tau        c the smallest kept probability

For a discarded entry v this is its share of the tail, for a kept entry the largest share that it
could have had. The result is close to the fixed shape with the least mean KL(tail || shape); the
mean *logit* is worse for flat students (docs/method.md). Vision positions and response-predicting
positions have separate templates. Sums are float64, so equal input gives an equal digest.
Dimensions as in schema/teacher_output.py.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from teacher_cache.records.lm_head import LmHead, row_chunks
from teacher_cache.records.top_k import top_k_record
from teacher_cache.schema.tensor_record import TensorRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class TailTemplate(TensorRecord):
    """Log shares of the mean tail; the shares sum to 1. None where no position had a tail."""

    vision: Float[Tensor, " V"] | None = None
    response: Float[Tensor, " V"] | None = None


class MeanTail:
    """Accumulates the tails of positions, batch by batch, in float64 on the CPU."""

    def __init__(self, vocab_size: int) -> None:
        self.count = 0
        """Positions so far that have a tail."""
        self._shares = torch.zeros(vocab_size, dtype=torch.float64)

    def update(
        self,
        hidden: Float[Tensor, "N D"],
        head: LmHead,
        k: int,
        top_p: float | None = None,
        min_k: int = 1,
    ) -> None:
        """Add the tails of states; `k`, `top_p` and `min_k` cut as in `top_k_record`."""
        for rows in row_chunks(len(hidden), head.vocab_size):
            logits = head.logits(hidden[rows])
            record = top_k_record(logits, k, top_p, min_k)
            has_tail = record.log_tail.isfinite()
            normaliser, log_tail = record.logsumexp[has_tail, None], record.log_tail[has_tail, None]
            log_p = logits[has_tail].to(normaliser.dtype) - normaliser
            smallest = record.logits[has_tail].amin(dim=1, keepdim=True).to(normaliser.dtype)
            most = torch.minimum(smallest - normaliser, log_tail)
            shares = (torch.minimum(log_p, most) - log_tail).exp()
            self._shares += shares.sum(dim=0, dtype=torch.float64).cpu()
            self.count += int(has_tail.sum())

    @property
    def log_shares(self) -> Float[Tensor, " V"] | None:
        """Log shares of the mean tail, float32; None where no position had a tail."""
        if not self.count:
            return None
        shares = self._shares.clamp(min=torch.finfo(torch.float32).tiny)
        return (shares / shares.sum()).log().to(torch.float32)
