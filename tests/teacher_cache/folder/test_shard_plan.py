"""Laws of splitting samples into shards."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.folder.shard_plan import group_shards, shard_of, spread_order

SIZES = st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0)


@given(
    groups=st.lists(st.none() | st.integers(0, 5), max_size=40),
    size=st.integers(1, 9),
)
def test_shards_of_groups_are_a_permutation_that_cuts_no_group_without_need(
    groups: list[int | None], size: int
) -> None:
    shards = group_shards(groups, size)
    order = [position for shard in shards for position in shard]
    assert sorted(order) == list(range(len(groups)))
    assert all(1 <= len(shard) <= size for shard in shards)
    places = {position: place for place, position in enumerate(order)}
    shard_numbers = {position: k for k, shard in enumerate(shards) for position in shard}
    for group in set(groups) - {None}:
        members = [position for position, each in enumerate(groups) if each == group]
        first = places[members[0]]
        assert [places[member] for member in members] == list(range(first, first + len(members)))
        num_shards = len({shard_numbers[member] for member in members})
        assert num_shards == -(-len(members) // size)
    heads = [p for p in order if groups[p] is None or groups.index(groups[p]) == p]
    assert heads == sorted(heads)


@given(groups=st.lists(st.none() | st.integers(0, 5), max_size=40), size=st.integers(1, 9))
def test_shards_of_groups_do_not_depend_on_the_groups_names(
    groups: list[int | None], size: int
) -> None:
    renamed = [None if group is None else f"group {-group}" for group in groups]
    assert group_shards(groups, size) == group_shards(renamed, size)


@given(count=st.integers(0, 60), size=st.integers(1, 9))
def test_samples_without_groups_keep_their_order_in_full_shards(count: int, size: int) -> None:
    shards = group_shards([None] * count, size)
    assert [position for shard in shards for position in shard] == list(range(count))
    assert all(len(shard) == size for shard in shards[:-1])


@given(sizes=SIZES)
def test_every_row_is_found_in_its_shard(sizes: list[int]) -> None:
    starts = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    found = [shard_of(starts, index) for index in range(sum(sizes))]
    assert found == [shard for shard, size in enumerate(sizes) for _ in range(size)]


@given(st.integers(0, 300))
def test_every_beginning_of_a_spread_order_is_spread(count: int) -> None:
    order = list(spread_order(count))
    assert sorted(order) == list(range(count))
    for taken in range(1, count + 1):
        cut = [0, *(place + 1 for place in sorted(order[:taken])), count]
        longest = max(stop - start for start, stop in pairwise(cut))
        assert longest <= 4 * count / taken + 1


def test_shards_of_no_row_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found|give|share|rank|expected"):
        group_shards(["a"], 0)
