"""`emkd build`: a pool of teacher actors takes shard numbers; each writes and commits its own.

Teacher tensors never pass through Ray: an actor returns the commit record of a shard, a few
hundred bytes. With `--no-ray` the same functions run in a plain loop and write the same bytes.
A shard that has cost two workers is searched for the samples that kill them, when all else is done.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from jobs.killers import TooManyDeathsError, find_killers
from jobs.options import RayOptions
from jobs.paths import absolute
from jobs.progress import Bars
from jobs.ray_pool import ActorPool, WorkerLostError, get, ray_session, worker_resources
from pipeline.build import CacheBuilder, build, finished, missing_shards
from pipeline.config import BuildConfig
from teacher_cache.manifest import Plan, Seal
from teacher_cache.storage import Store, open_store
from teacher_cache.writer import seal_cache

logger = logging.getLogger(__name__)


class TeacherWorker(CacheBuilder):
    """A `CacheBuilder` that can be asked, from another thread, how far it is."""

    def __init__(self, config: BuildConfig) -> None:
        super().__init__(config, self._note)
        self._lock = threading.Lock()
        self._state = ("load teacher", 0, 1)

    def _note(self, what: str, done: int, total: int) -> None:
        with self._lock:
            self._state = (what, done, total)

    def status(self) -> tuple[str, int, int]:
        """What is being done, how much of it, of how much."""
        with self._lock:
            return self._state


def run_build(config: BuildConfig, options: RayOptions) -> Seal:
    """Build, or finish building, the cache of `config`; returns its seal."""
    config = absolute(config)
    seal = finished(config)
    if seal is not None:
        return seal
    with Bars() as bars:
        if not options.ray:
            return build(config, bars.update)
        with ray_session():
            each = worker_resources(options, config.device)
            first = _make(config, each)
            plan: Plan = _wait(first.prepare.remote(), first, bars)
            _build_shards(
                open_store(config.out),
                plan,
                ActorPool(lambda: _make(config, each), first, options),
                bars,
            )
    return seal_cache(open_store(config.out))


def _make(config: BuildConfig, resources: Mapping[str, float]) -> Any:
    # Two threads: one works, the other answers `status`. Restarts are the pool's business.
    actor = ray.remote(TeacherWorker).options(
        num_cpus=resources["CPU"],
        num_gpus=resources["GPU"],
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=2,
    )
    return actor.remote(config)


def _wait(reference: Any, actor: Any, bars: Bars) -> Any:
    while not ray.wait([reference], timeout=0.5)[0]:
        bars.update(*get(actor.status.remote()))
    return get(reference)


def _build_shards(cache: Store, plan: Plan, pool: ActorPool, bars: Bars) -> None:
    missing = missing_shards(cache)
    sizes = [len(shard) for shard in plan.shards]
    done = plan.num_samples - sum(sizes[index] for index in missing)

    def show(states: Sequence[tuple[str, int, int]]) -> None:
        running = sum(part for what, part, _ in states if what.startswith("shard"))
        bars.update("samples", min(done + running, plan.num_samples), plan.num_samples)

    lost: list[int] = []
    for index, _ in pool.map("build_shard", missing, show, lost):
        done += sizes[index]
        bars.update("samples", done, plan.num_samples)
    for index in lost:
        _build_without_killers(pool, index, sizes[index])
        done += sizes[index]
        bars.update("samples", done, plan.num_samples)
    if pool.losses:
        logger.warning("%d workers were lost: %s", len(pool.losses), "; ".join(pool.losses))


def _build_without_killers(pool: ActorPool, index: int, num_samples: int) -> None:
    """Build a shard that two workers have died of; its killers are rejected as bad samples are."""

    def survives(start: int, stop: int) -> bool:
        try:
            pool.call("probe", index, start, stop)
        except WorkerLostError:
            return False
        return True

    try:
        killers = find_killers(survives, num_samples)
        pool.call("build_shard", index, killers)
    except (WorkerLostError, TooManyDeathsError) as error:
        raise WorkerLostError(
            f"shard {index}: its workers keep dying, and not of single samples alone; are they out "
            f"of memory? Lower --batch-size or --num-workers. {error}"
        ) from error
