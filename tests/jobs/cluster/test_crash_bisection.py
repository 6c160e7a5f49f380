"""The search for samples that kill their worker: exact, and bounded in what it costs."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.cluster.crash_bisection import MAX_DEATHS, TooManyDeathsError, find_crashing_samples


class Victims:
    """Workers, which die of a range with a killer in it."""

    def __init__(self, killers: set[int]) -> None:
        self.killers = killers
        self.num_deaths = 0

    def survives(self, start: int, stop: int) -> bool:
        dies = any(start <= killer < stop for killer in self.killers)
        self.num_deaths += dies
        return not dies


@settings(deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_all_killers_are_found_and_nobody_else(case: tuple[int, set[int]]) -> None:
    num_samples, killers = case
    if not killers:
        return  # a worker has died of the whole
    victims = Victims(killers)
    found = find_crashing_samples(victims.survives, num_samples, max_deaths=10_000)
    assert found == sorted(killers)
    depth = math.ceil(math.log2(num_samples)) if num_samples > 1 else 0
    assert victims.num_deaths <= len(killers) * depth


def test_three_killers_in_a_shard_are_within_the_bound() -> None:
    victims = Victims({3, 130, 255})
    assert find_crashing_samples(victims.survives, 256) == [3, 130, 255]
    assert victims.num_deaths <= 23


def test_the_search_is_given_up_where_everything_kills() -> None:
    victims = Victims(set(range(256)))
    with pytest.raises(TooManyDeathsError, match="workers died in the search"):
        find_crashing_samples(victims.survives, 256)
    assert victims.num_deaths == MAX_DEATHS


def test_a_shard_that_kills_only_as_a_whole_has_no_killer() -> None:
    assert find_crashing_samples(lambda start, stop: stop - start < 8, 8) == []
