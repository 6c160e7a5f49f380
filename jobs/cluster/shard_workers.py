"""Workers that write the shards of one cache: a build's, or an extension's.

    plan    the first worker alone: it writes the plan, the others read it
    shards  by number, each written and committed by whichever worker took it
    lost    a shard that has cost two workers is searched for the samples that kill them, when all
            else is done

Teacher tensors never pass through Ray: a worker returns the commit record of a shard, a few hundred
bytes.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from jobs.cluster.actor_pool import ActorPool, WorkerLostError, get, worker_resources
from jobs.cluster.crash_bisection import TooManyDeathsError, find_crashing_samples
from jobs.cluster.options import RayOptions
from jobs.cluster.progress import ProgressBars
from pipeline.build.shard_builder import missing_shards
from teacher_cache.folder.writer import seal_cache
from teacher_cache.schema.manifest import Plan, Seal
from teacher_cache.schema.progress import Progress
from teacher_cache.storage.store import Store

logger = logging.getLogger(__name__)


class ShardWorker:
    """An actor around a `ShardBuilder`, which can be asked how far it is while it works.

    `make` builds it on first use: what a constructor raises, Ray reports as the actor's death.
    """

    def __init__(self, make: Callable[[Progress], Any]) -> None:
        self._make = make
        self._builder: Any = None
        self._lock = threading.Lock()
        self._state = ("load teacher", 0, 1)

    def work(self, method: str, *arguments: Any) -> Any:
        """Call a method of the builder."""
        if self._builder is None:
            self._builder = self._make(self._note)
        return getattr(self._builder, method)(*arguments)

    def build_shard(self, index: int, crashing: Sequence[int] = ()) -> Any:
        """Write and commit a shard."""
        return self.work("build_shard", index, crashing)

    def probe(self, index: int, start: int, stop: int) -> None:
        """Run the teacher over some samples of a shard."""
        self.work("probe", index, start, stop)

    def status(self) -> tuple[str, int, int]:
        """What is being done, how much of it, of how much."""
        with self._lock:
            return self._state

    def _note(self, what: str, done: int, total: int) -> None:
        with self._lock:
            self._state = (what, done, total)


def write_shards(
    make: Callable[[Progress], Any],
    cache: Store,
    device: str,
    options: RayOptions,
    bars: ProgressBars,
) -> Seal:
    """Have a pool of workers plan and write what is missing of a cache, and seal it.

    `make` builds a worker's `ShardBuilder` that also has `probe`; inside a Ray session.
    """
    each = worker_resources(options, device)
    first = _actor(make, each)
    plan: Plan = _wait(first.work.remote("prepare"), first, bars)
    _write_missing(cache, plan, ActorPool(lambda: _actor(make, each), first, options), bars)
    return seal_cache(cache)


def _actor(make: Callable[[Progress], Any], resources: Mapping[str, float]) -> Any:
    # Two threads: one works, the other answers `status`. Restarts are the pool's business.
    actor = ray.remote(ShardWorker).options(
        num_cpus=resources["CPU"],
        num_gpus=resources["GPU"],
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=2,
    )
    return actor.remote(make)


def _wait(reference: Any, actor: Any, bars: ProgressBars) -> Any:
    while not ray.wait([reference], timeout=0.5)[0]:
        bars.update(*get(actor.status.remote()))
    return get(reference)


def _write_missing(cache: Store, plan: Plan, pool: ActorPool, bars: ProgressBars) -> None:
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
        killers = find_crashing_samples(survives, num_samples)
        pool.call("build_shard", index, killers)
    except (WorkerLostError, TooManyDeathsError) as error:
        raise WorkerLostError(
            f"shard {index}: its workers keep dying, and not of single samples alone; are they out "
            f"of memory? Lower --batch-size or --num-workers. {error}"
        ) from error
