"""Promises of reading ahead: order, bounds, errors where they are due, threads that end."""

import threading
from collections.abc import Iterator
from itertools import count, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.data.prefetch import read_ahead


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(0, 12),
    num_threads=st.integers(0, 4),
    depth=st.integers(1, 6),
    fails_at=st.none() | st.integers(0, 11),
)
def test_results_come_in_order_up_to_the_one_that_fails(
    size: int, num_threads: int, depth: int, fails_at: int | None
) -> None:
    def load(number: int) -> int:
        if number == fails_at:
            raise OSError("gone")
        return number * number

    results = read_ahead(load, iter(range(size)), num_threads, depth)
    num_good = size if fails_at is None else min(size, fails_at)
    assert list(islice(results, num_good)) == [number * number for number in range(num_good)]
    if num_good < size:
        with pytest.raises(OSError, match="gone"):
            next(results)
    else:
        assert not list(results)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_no_more_than_the_bound_is_ever_begun_and_not_taken(num_threads: int) -> None:
    depth = 4
    asked = 0
    begun: list[int] = []

    def arguments() -> Iterator[int]:
        nonlocal asked
        for number in count():
            asked = number + 1
            yield number

    results = read_ahead(lambda n: begun.append(n) or n, arguments(), num_threads, depth)
    for num_taken in range(1, 20):
        next(results)
        assert len(begun) <= asked <= num_taken + depth - 1


def test_threads_work_at_the_same_time() -> None:
    together = threading.Barrier(2, timeout=30)  # passes only where two calls wait at once
    results = read_ahead(lambda _: together.wait(), iter(range(4)), 2, 4)
    assert sorted(islice(results, 4)) == [0, 0, 1, 1]


def test_calls_go_on_while_results_are_used() -> None:
    begun = threading.Semaphore(0)
    results = read_ahead(lambda _: begun.release(), count(), 1, 3)
    next(results)
    for _ in range(3):  # the first, and both that may wait, though nobody asks for them
        assert begun.acquire(timeout=30)


def test_threads_end_with_the_iterator() -> None:
    results = read_ahead(lambda n: n, count(), 2, 4)
    next(results)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
    assert threads
    del results
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
