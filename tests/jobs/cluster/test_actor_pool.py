"""Promises of the actor pool: bounded retries, lost work done by another, errors as themselves."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster.options import RayOptions
from tests.support.lazy import ActorPool, actor_pool, ray, ray_session, worker_resources

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.mark.parametrize(
    ("asked", "device", "gpus"),
    [(None, "auto", 1.0), (None, "cpu", 0.0), (0.0, "auto", 0.0), (0.5, "auto", 0.5)],
)
def test_workers_get_a_gpu_where_there_is_one(
    asked: float | None, device: str, gpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    options = RayOptions(num_workers=2, gpus_per_worker=asked)
    assert worker_resources(options, device) == {"CPU": 1.0, "GPU": gpus}
    with pytest.raises(ValueError, match="3 workers need 3 GPUs"):
        worker_resources(RayOptions(num_workers=3, gpus_per_worker=1.0), device)


def test_workers_get_no_gpu_where_there_is_none() -> None:
    assert worker_resources(RayOptions(), "auto") == {"CPU": 1.0, "GPU": 0.0}


class CannotSquareError(ValueError):
    """What the worker raises; with two arguments, as SampleError has."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"{number} {reason}")
        self.number = number
        self.reason = reason

    def __reduce__(self) -> tuple[type["CannotSquareError"], tuple[int, str]]:
        return (CannotSquareError, (self.number, self.reason))


class Worker:
    """Dies at number 3 as often as told, hangs at number 6 as often, raises at number 5.

    Else it returns the square.
    """

    def __init__(self, folder: Path, deaths: int) -> None:
        self._folder = folder
        self._deaths = deaths

    def work(self, number: int) -> int:
        if number == 3 and len(list(self._folder.iterdir())) < self._deaths:
            (self._folder / f"{os.getpid()}").touch()
            os._exit(1)
        if number == 6 and len(list(self._folder.iterdir())) < self._deaths:
            (self._folder / f"{os.getpid()}").touch()
            time.sleep(3600)
        if number == 5:
            raise CannotSquareError(5, "cannot be squared")
        return number * number

    def status(self) -> str:
        return "at work"


def _pool(
    folder: Path, deaths: int, max_retries: int, worker_timeout: float | None = None
) -> ActorPool:
    options = RayOptions(num_workers=2, max_retries=max_retries, worker_timeout=worker_timeout)

    def make() -> Any:
        return ray.remote(Worker).options(max_restarts=0, max_concurrency=2).remote(folder, deaths)

    return ActorPool(make, make(), options)


def test_work_whose_worker_died_is_done_by_another(tmp_path: Path) -> None:
    pool = _pool(tmp_path, deaths=2, max_retries=2)
    results = dict(pool.map("work", [0, 1, 2, 3, 4], lambda _: None))
    assert results == {number: number * number for number in range(5)}


def test_retries_are_bounded(tmp_path: Path) -> None:
    pool = _pool(tmp_path, deaths=1000, max_retries=1)
    with pytest.raises(actor_pool.WorkerLostError, match=r"work\(3\): its worker was lost 2 times"):
        list(pool.map("work", [0, 3], lambda _: None))
    assert len(list(tmp_path.iterdir())) == 2


def test_an_error_in_a_worker_is_raised_as_itself(tmp_path: Path) -> None:
    pool = _pool(tmp_path, deaths=0, max_retries=1)
    with pytest.raises(CannotSquareError, match="cannot be squared"):
        list(pool.map("work", [0, 5], lambda _: None))


def test_work_whose_worker_hangs_is_done_by_another(tmp_path: Path) -> None:
    pool = _pool(tmp_path, deaths=1, max_retries=2, worker_timeout=5.0)
    results = dict(pool.map("work", [4, 6], lambda _: None))
    assert results == {4: 16, 6: 36}
    assert pool.losses == ["work(6): it made no progress for 5 s (at work)"]
    (pid,) = (path.name for path in tmp_path.iterdir())
    while Path(f"/proc/{pid}").exists():  # the hung one is killed, not left behind
        time.sleep(0.1)


def test_work_that_always_hangs_ends_in_an_error(tmp_path: Path) -> None:
    pool = _pool(tmp_path, deaths=1000, max_retries=1, worker_timeout=3.0)
    with pytest.raises(
        actor_pool.WorkerLostError, match=r"was lost 2 times; the last time it made no pro"
    ):
        list(pool.map("work", [6], lambda _: None))
    with pytest.raises(
        actor_pool.WorkerLostError, match=r"work\(6,\): its worker was lost, it made no prog"
    ):
        pool.call("work", 6)
    assert pool.call("work", 4) == 16
