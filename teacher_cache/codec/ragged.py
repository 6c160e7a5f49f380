"""Flattens rows of different lengths without padding, and restores them.

Only kept entries are stored, rank by rank, longest row first: the first entry of every row, then
the second of every row that has one, and so on. Similar numbers are then neighbours.

`unflatten` pads every row to the longest with its first entry, as `TopKRecord` does. It raises
ValueError for counts that do not fit, before it allocates.
"""

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


def flatten(values: Shaped[Tensor, "N K"], counts: Int[Tensor, " N"]) -> Shaped[Tensor, " E"]:
    """The first `counts[i]` entries of each row i."""
    longest_first = counts.argsort(descending=True, stable=True)
    most = _most(counts)
    return values[longest_first, :most].T[_inside(counts, most)]


def unflatten(
    values: Shaped[Tensor, "..."], counts: Int[Tensor, " N"], limit: int
) -> Shaped[Tensor, "N K"]:
    """The inverse of `flatten`, with the largest count as K (1 without rows), at most `limit`."""
    num_rows, total = len(counts), int(counts.sum(dtype=torch.int64))
    if num_rows and not 1 <= int(counts.min()) <= int(counts.max()) <= limit:
        raise ValueError(
            f"positions keep {int(counts.min())}..{int(counts.max())} entries, expected 1..{limit}"
        )
    if values.shape != (total,):
        raise ValueError(f"entries of shape {list(values.shape)}, the counts sum to {total}")
    longest_first = counts.argsort(descending=True, stable=True)
    most = _most(counts)
    by_rank = values[:num_rows].repeat(most, 1)
    by_rank.masked_scatter_(_inside(counts, most), values)
    rows = torch.empty_like(by_rank.T)
    rows[longest_first] = by_rank.T
    return rows


def lengths_by_rank(counts: Int[Tensor, " N"]) -> list[int]:
    """The number of rows that have each rank; empty for no rows."""
    return _inside(counts, _most(counts)).sum(dim=1).tolist() if len(counts) else []


def _most(counts: Tensor) -> int:
    return int(counts.max()) if len(counts) else 1


def _inside(counts: Tensor, num_kept: int) -> Bool[Tensor, "K N"]:
    """True at the ranks that each row has; longest rows first."""
    descending = counts.sort(descending=True).values
    return torch.arange(num_kept)[:, None] < descending
