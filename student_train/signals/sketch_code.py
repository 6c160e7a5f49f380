"""Holds a sketch of the teacher's logits: coefficients and the basis that decodes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from teacher_cache.records.sketch import SketchBasis, decode_codes

_COLUMNS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchCode:
    """A `SketchRecord` together with its basis."""

    codes: Int8[Tensor, "N S"]
    scale: Float[Tensor, " N"]
    tail_shift: Float[Tensor, " N"]
    basis: SketchBasis
    decoded: Float[Tensor, "N V"] | None = None
    """All logits, once `decode` has computed them."""

    def decode(self) -> "SketchCode":
        """The same with all N x V logits decoded, for a few positions that are read repeatedly."""
        known = self.scale.new_empty(len(self.codes), self.basis.vocab_size, dtype=torch.float32)
        every = torch.arange(self.basis.vocab_size, device=known.device)
        # The directions are widened block by block.
        for columns, ids in zip(
            known.split(_COLUMNS_AT_ONCE, dim=1), every.split(_COLUMNS_AT_ONCE), strict=True
        ):
            columns.copy_(self.logits(ids))
        return replace(self, decoded=known)

    def logits(self, ids: Int[Tensor, " C"] | None = None) -> Float[Tensor, "N columns"]:
        """Approximate raw logits at the vocabulary rows `ids`, or at all of them."""
        if self.decoded is not None:
            return self.decoded if ids is None else self.decoded[:, ids]
        return decode_codes(self.basis, self.codes, self.scale, ids)

    def each(self, change: Callable[[Tensor], Tensor]) -> "SketchCode":
        """Apply `change` (an index, a device move) to every tensor with one row per position."""
        return replace(
            self,
            codes=change(self.codes),
            scale=change(self.scale),
            tail_shift=change(self.tail_shift),
            decoded=None if self.decoded is None else change(self.decoded),
        )


def concatenate_codes(codes: Sequence[SketchCode]) -> SketchCode:
    """The codes of several sketches that share a basis, in order."""
    return SketchCode(
        codes=torch.cat([code.codes for code in codes]),
        scale=torch.cat([code.scale for code in codes]),
        tail_shift=torch.cat([code.tail_shift for code in codes]),
        basis=codes[0].basis,
    )
