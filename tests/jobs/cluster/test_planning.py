"""Which samples are blamed when planning loses its workers, told by a pool without processes."""

from collections.abc import Collection, Sequence
from typing import Any

import pytest

from jobs.cluster.options import RayOptions
from jobs.cluster.progress import ProgressBars
from teacher_cache.schema.manifest import Plan
from tests.support.lazy import actor_pool, plan_cache

NUM_SAMPLES = 200
PLAN = object.__new__(Plan)


class Pool:
    """Loses a worker at every call that touches a deadly sample."""

    def __init__(
        self,
        unreadable: Collection[int] = (),
        deadly: Collection[int] = (),
        num_run_over: int = NUM_SAMPLES,
        loads: bool = True,
    ) -> None:
        self.unreadable, self.deadly, self.loads = set(unreadable), set(deadly), loads
        self.order = list(range(num_run_over))
        self.losses: list[str] = []
        self.planned: tuple[list[int], list[int]] | None = None

    def call(self, method: str, *arguments: Any, on_poll: Any = None) -> Any:
        return getattr(self, method)(*arguments)

    def _lose(self, is_lost: bool) -> None:
        if is_lost:
            self.losses.append("lost")
            raise actor_pool.WorkerLostError("it died")

    def prepare(self, unreadable: Sequence[int], crashing: Sequence[int]) -> Plan:
        met = self.unreadable - set(unreadable)
        met |= self.deadly.intersection(self.order) - set(crashing)
        self._lose(bool(met) or not self.loads)
        self.planned = [*unreadable], [*crashing]
        return PLAN

    def num_to_read(self) -> int:
        return NUM_SAMPLES

    def read_only(self, positions: Sequence[int]) -> None:
        self._lose(not self.unreadable.isdisjoint(positions))

    def calibration_order(self, unreadable: Sequence[int]) -> tuple[list[int], int | None]:
        return [n for n in self.order if n not in unreadable], None

    def run_over(self, positions: Sequence[int]) -> int:
        bad = self.unreadable | self.deadly
        self._lose(not bad.isdisjoint(positions) or not self.loads)
        return len(positions)


def _planned(pool: Any, **options: Any) -> Any:
    plan_cache(pool, RayOptions(**options), ProgressBars())
    return pool.planned


def test_samples_that_cannot_be_read_are_left_out() -> None:
    assert _planned(Pool()) == ([], [])
    assert _planned(Pool(unreadable=[0, 7, 199])) == ([0, 7, 199], [])


def test_samples_that_crash_the_teacher_are_left_out() -> None:
    assert _planned(Pool(deadly=[3, 64, 199])) == ([], [3, 64, 199])
    assert _planned(Pool(unreadable=[5], deadly=[3, 150])) == ([5], [3, 150])


def test_a_teacher_that_cannot_be_loaded_is_no_samples_fault() -> None:
    pool = Pool(loads=False)
    with pytest.raises(actor_pool.WorkerLostError):
        _planned(pool)
    assert len(pool.losses) == 3


def test_crashes_that_no_sample_explains_end_the_build() -> None:
    class Tired(Pool):
        def prepare(self, unreadable: Sequence[int], crashing: Sequence[int]) -> Plan:
            self._lose(True)
            return PLAN

    with pytest.raises(actor_pool.WorkerLostError, match="no single sample explains it"):
        _planned(Tired())


def test_a_source_full_of_crashes_is_not_searched_for_ever() -> None:
    pool = Pool(unreadable=range(NUM_SAMPLES))
    with pytest.raises(actor_pool.WorkerLostError, match="workers keep dying"):
        _planned(pool)
    assert len(pool.losses) < 40


def test_without_retries_the_first_loss_ends_the_build() -> None:
    pool = Pool(unreadable=[1])
    with pytest.raises(actor_pool.WorkerLostError):
        _planned(pool, max_retries=0)
    assert len(pool.losses) == 1
