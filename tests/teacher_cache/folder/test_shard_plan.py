"""Laws of splitting, and of the endless shuffled order."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.data.sample_order import SampleOrder
from teacher_cache.folder.shard_plan import group_shards, shard_of, spread_order

SIZES = st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0)
SEEDS = st.integers(0, 2**64 - 1)


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


@settings(deadline=None)
@given(sizes=SIZES, seed=SEEDS, window=st.integers(1, 9), epoch=st.integers(0, 3))
def test_every_epoch_is_a_permutation(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    order, num_rows = SampleOrder(sizes, seed, window), sum(sizes)
    rows = [order.index_at(epoch * num_rows + offset) for offset in range(num_rows)]
    assert sorted(rows) == list(range(num_rows))


@settings(deadline=None)
@given(sizes=SIZES, seed=SEEDS, window=st.integers(1, 9))
def test_few_shards_are_touched_at_a_time(sizes: list[int], seed: int, window: int) -> None:
    order, num_rows = SampleOrder(sizes, seed, window), sum(sizes)
    starts = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    shards = [shard_of(starts, order.index_at(offset)) for offset in range(num_rows)]
    open_shards: set[int] = set()
    for offset, shard in enumerate(shards):
        open_shards.add(shard)
        open_shards &= set(shards[offset:])  # a shard whose rows are all read can be closed
        assert len(open_shards) <= window


@settings(deadline=None)
@given(sizes=SIZES, seed=SEEDS, window=st.integers(1, 9), positions=st.lists(st.integers(0, 60)))
def test_a_position_means_the_same_row_whatever_was_read_before(
    sizes: list[int], seed: int, window: int, positions: list[int]
) -> None:
    order = SampleOrder(sizes, seed, window)
    whole = [SampleOrder(sizes, seed, window).index_at(p) for p in range(61)]
    assert [order.index_at(p) for p in positions] == [whole[p] for p in positions]


def test_the_order_stays_the_same_from_version_to_version() -> None:
    order = SampleOrder([3, 0, 4, 2], seed=7, window=2)
    assert [order.index_at(p) for p in range(18)] == GOLDEN


GOLDEN = [8, 7, 1, 2, 0, 6, 5, 4, 3, 7, 8, 0, 4, 6, 5, 2, 1, 3]


def test_seeds_and_epochs_give_different_orders() -> None:
    sizes = [10] * 10
    orders = [
        tuple(SampleOrder(sizes, seed, 4).index_at(epoch * 100 + p) for p in range(100))
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 9


@given(st.integers(0, 300))
def test_every_beginning_of_a_spread_order_is_spread(count: int) -> None:
    order = list(spread_order(count))
    assert sorted(order) == list(range(count))
    for taken in range(1, count + 1):
        cut = [0, *(place + 1 for place in sorted(order[:taken])), count]
        longest = max(stop - start for start, stop in pairwise(cut))
        assert longest <= 4 * count / taken + 1


def test_senseless_numbers_are_refused() -> None:
    for call in (
        lambda: group_shards(["a"], 0),
        lambda: SampleOrder([], 0, 1),
        lambda: SampleOrder([0, 0], 0, 1),
        lambda: SampleOrder([2, -1], 0, 1),
        lambda: SampleOrder([2], -1, 1),
        lambda: SampleOrder([2], 0, 0),
        lambda: SampleOrder([2], 0, 1).index_at(-1),
    ):
        with pytest.raises(ValueError, match=r"found|give|share|rank|expected"):
            call()
