"""Maps each sample's tokens to columns of a padded batch, before and after some were dropped.

Promise: a sample's tokens are adjacent and in order, whatever was dropped. Padding stays on its
side, or goes left where there was none (so that the last column predicts the next token). Asking
for a dropped token is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from teacher_cache.encoding.collate import ModelBatch

PADDING = -1
"""The position of columns that hold no token."""


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """Each row's tokens, as ascending positions in their sample, and its first column.

    Tensors are on the CPU.
    """

    rows: tuple[Int[Tensor, " _"], ...]
    starts: tuple[int, ...]
    length: int

    @cached_property
    def positions(self) -> Int[Tensor, "B L"]:
        """The position in its sample of each column's token, -1 for padding."""
        positions_BL = torch.full((len(self.rows), self.length), PADDING)
        for row, (tokens, start) in enumerate(zip(self.rows, self.starts, strict=True)):
            positions_BL[row, start : start + len(tokens)] = tokens
        return positions_BL

    @property
    def is_token(self) -> Bool[Tensor, "B L"]:
        """Which columns hold a token."""
        return self.positions != PADDING

    def columns(self, row: int, positions: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return the columns of the given tokens of sample `row`; ValueError for dropped ones."""
        tokens = self.rows[row]
        found = torch.searchsorted(tokens, positions).clamp(max=max(0, len(tokens) - 1))
        missing = positions[~torch.isin(positions, tokens)]
        if len(missing):
            raise ValueError(
                f"position {int(missing[0])} of row {row} is not in the layout: it was dropped, or "
                f"the sample is shorter; ask for tokens that were kept ({len(missing)} were not)"
            )
        return found + self.starts[row]

    def kept(self, row: int, positions: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Return which of the given tokens of sample `row` are in the layout."""
        return torch.isin(positions, self.rows[row])

    def only(self, rows: Sequence[Int[Tensor, " _"]]) -> "TokenLayout":
        """Return the layout with only these tokens of each row, padded to the longest."""
        length = max(len(tokens) for tokens in rows)
        ends = (s + len(tokens) for tokens, s in zip(self.rows, self.starts, strict=True))
        pads_right = any(end < self.length for end in ends)
        starts = tuple(0 if pads_right else length - len(tokens) for tokens in rows)
        return TokenLayout(rows=tuple(rows), starts=starts, length=length)

    def index_of(self, other: "TokenLayout") -> Int[Tensor, "B K"]:
        """Return, for each column of `other`, the column here of its token (0 for padding)."""
        index_BK = torch.zeros_like(other.positions)
        for row, (tokens, start) in enumerate(zip(other.rows, other.starts, strict=True)):
            index_BK[row, start : start + len(tokens)] = self.columns(row, tokens)
        return index_BK


def layout_of(batch: ModelBatch, num_new: int = 0) -> TokenLayout:
    """Return the layout of a collated batch, with `num_new` generated tokens appended to each row.

    ValueError for new tokens in a batch padded on the right: they would follow padding.
    """
    length = batch.inputs["input_ids"].shape[1]
    num_tokens = [sample.num_tokens for sample in batch.samples]
    ends = [n + offset for n, offset in zip(num_tokens, batch.offsets, strict=True)]
    if num_new and min(ends) < length:
        raise ValueError(
            f"the model is run on {num_new} more tokens than the batch has, which is padded on the "
            "right; collate it with side='left' to generate"
        )
    return TokenLayout(
        rows=tuple(torch.arange(count + num_new) for count in num_tokens),
        starts=batch.offsets,
        length=length + num_new,
    )
