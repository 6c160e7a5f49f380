"""Laws of the endless shuffled order in which a student reads a cache."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.data.sample_order import SampleOrder
from teacher_cache.folder.shard_plan import shard_of

SIZES = st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0)
SEEDS = st.integers(0, 2**64 - 1)


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


@settings(deadline=None)
@given(sizes=SIZES, seed=SEEDS, window=st.integers(1, 9), data=st.data())
def test_the_order_with_skipped_rows_is_that_of_shards_without_them(
    sizes: list[int], seed: int, window: int, data: st.DataObject
) -> None:
    skipped = data.draw(st.sets(st.integers(0, sum(sizes) - 1), max_size=sum(sizes) - 1))
    rows = list(range(sum(sizes)))
    shards = [[rows.pop(0) for _ in range(size)] for size in sizes]
    kept = [[row for row in shard if row not in skipped] for shard in shards]
    flat = [row for shard in kept for row in shard]
    plain = SampleOrder([len(shard) for shard in kept], seed, window)
    order = SampleOrder(sizes, seed, window, skipped)
    assert order.num_rows == len(flat)
    positions = range(2 * len(flat))
    assert [order.index_at(p) for p in positions] == [flat[plain.index_at(p)] for p in positions]


def test_skipping_every_row_is_refused() -> None:
    with pytest.raises(ValueError, match="all 3 are skipped"):
        SampleOrder([2, 1], 0, 1, {0, 1, 2})


def test_the_order_stays_the_same_from_version_to_version() -> None:
    order = SampleOrder([3, 0, 4, 2], seed=7, window=2)
    golden = [8, 7, 1, 2, 0, 6, 5, 4, 3, 7, 8, 0, 4, 6, 5, 2, 1, 3]
    assert [order.index_at(p) for p in range(18)] == golden


def test_seeds_and_epochs_give_different_orders() -> None:
    sizes = [10] * 10
    orders = [
        tuple(SampleOrder(sizes, seed, 4).index_at(epoch * 100 + p) for p in range(100))
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 9


@pytest.mark.parametrize(
    ("sizes", "seed", "window", "position"),
    [
        ([], 0, 1, 0),
        ([0, 0], 0, 1, 0),
        ([2, -1], 0, 1, 0),
        ([2], -1, 1, 0),
        ([2], 0, 0, 0),
        ([2], 0, 1, -1),
    ],
)
def test_senseless_numbers_are_refused(
    sizes: list[int], seed: int, window: int, position: int
) -> None:
    with pytest.raises(ValueError, match=r"found|give|share|rank|expected"):
        SampleOrder(sizes, seed, window).index_at(position)
