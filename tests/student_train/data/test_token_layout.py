"""Where tokens sit before and after some were dropped."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.data.token_layout import TokenLayout


def layout(lengths: list[int], side: str) -> TokenLayout:
    longest = max(lengths)
    return TokenLayout(
        rows=tuple(torch.arange(n) for n in lengths),
        starts=tuple(longest - n if side == "left" else 0 for n in lengths),
        length=longest,
    )


@settings(deadline=None)
@given(data=st.data(), side=st.sampled_from(["left", "right"]))
def test_every_kept_token_is_found_and_no_other(data: st.DataObject, side: str) -> None:
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    before = layout(lengths, side)
    rows = [
        torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))) for n in lengths
    ]
    after = before.only(rows)
    assert after.length == max(len(row) for row in rows)
    ids_BL = 100 * torch.arange(len(lengths))[:, None] + before.positions
    moved_BK = ids_BL.gather(1, before.index_of(after))
    for row, tokens in enumerate(rows):
        columns = after.columns(row, tokens)
        assert moved_BK[row, columns].tolist() == (100 * row + tokens).tolist()
        assert after.positions[row, columns].tolist() == tokens.tolist()
        assert int(after.is_token[row].sum()) == len(tokens)
        assert (
            after.kept(row, torch.arange(lengths[row])).nonzero()[:, 0].tolist() == tokens.tolist()
        )


def test_padding_stays_on_its_side_and_goes_left_where_there_was_none() -> None:
    kept = [torch.tensor([0]), torch.tensor([0, 2])]
    assert layout([3, 2], "right").only(kept).positions.tolist() == [[0, -1], [0, 2]]
    assert layout([2, 3], "left").only(kept).positions.tolist() == [[-1, 0], [0, 2]]
    assert layout([3, 3], "right").only(kept).positions.tolist() == [[-1, 0], [0, 2]]


def test_a_token_that_was_dropped_has_no_column() -> None:
    short = layout([4], "right").only([torch.tensor([0, 3])])
    assert short.columns(0, torch.tensor([3, 0])).tolist() == [1, 0]
    with pytest.raises(ValueError, match="position 2 of row 0 is not in the layout"):
        short.columns(0, torch.tensor([0, 2]))
