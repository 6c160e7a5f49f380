"""Kept entries alone, and back: the order that format.md promises, counts that lie are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codec.ragged import flatten, lengths_by_rank, unflatten


def _plain(rows: list[list[int]]) -> list[int]:
    """Rank by rank of the rows that keep most first, ties in order."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    most = max(map(len, rows), default=0)
    return [rows[row][rank] for rank in range(most) for row in order if rank < len(rows[row])]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), max_size=7), st.integers(0, 2)
)
def test_entries_stand_rank_by_rank_and_come_back_padded(rows: list[list[int]], spare: int) -> None:
    most = max(map(len, rows), default=1)
    padded = torch.tensor([row + [-1] * (most + spare - len(row)) for row in rows]).long()
    padded = padded.reshape(len(rows), most + spare)
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    flat = flatten(padded, counts)
    assert flat.tolist() == _plain(rows)
    lengths = [sum(len(row) > rank for row in rows) for rank in range(most)]
    assert lengths_by_rank(counts) == (lengths if rows else [])
    back = unflatten(flat, counts, most)
    assert back.shape == (len(rows), most)
    for row, found in zip(rows, back.tolist(), strict=True):
        assert found == row + row[:1] * (most - len(row))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([2, 0, 1], r"keep 0\.\.2 entries"),
        ([-1, 2, 2], r"keep -1\.\.2 entries"),
        ([1, 1, 2**30], r"keep 1\.\.1073741824 entries, expected 1\.\.4"),
        ([1, 1, 2], r"shape \[3\], the counts sum to 4"),
    ],
)
def test_counts_that_do_not_fit_are_refused(counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unflatten(torch.zeros(3), torch.tensor(counts, dtype=torch.int32), 4)
