"""Writes the shards of one cache with Ray workers, for a build or an extension.

The first worker writes the plan (planning.py). Each shard is written and committed by the worker
that takes its number. A shard that has crashed two workers is searched, at the end, for the samples
that crash them. A worker returns commit records of some 100 bytes; teacher tensors never pass
through Ray.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from jobs.cluster.actor_pool import ActorPool, WorkerLostError, worker_resources
from jobs.cluster.crash_bisection import TooManyDeathsError, find_crashing_samples
from jobs.cluster.options import RayOptions
from jobs.cluster.planning import plan_cache
from jobs.cluster.progress import ProgressBars
from pipeline.build.shard_builder import missing_shards
from teacher_cache.folder.writer import seal_cache
from teacher_cache.schema.manifest import Plan, Seal
from teacher_cache.schema.progress import Progress
from teacher_cache.storage.store import Store

logger = logging.getLogger(__name__)


class ShardWorker:
    """An actor with a `ShardBuilder`; reports its progress while it works.

    `make` runs on first use, since Ray reports an exception of a constructor as the actor's death.
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

    def prepare(self, unreadable: Sequence[int] = (), crashing: Sequence[int] = ()) -> Any:
        """Write the plan without these samples of the source."""
        return self.work("prepare", unreadable, crashing)

    def num_to_read(self) -> int:
        """How many samples of the source planning reads."""
        return self.work("num_to_read")

    def read_only(self, positions: Sequence[int]) -> None:
        """Read some samples of the source."""
        self.work("read_only", positions)

    def calibration_order(self, unreadable: Sequence[int]) -> Any:
        """Positions in the order of calibration, and the tokens that it takes."""
        return self.work("calibration_order", unreadable)

    def run_over(self, positions: Sequence[int]) -> int:
        """Load the teacher and run it over some samples of the source."""
        return self.work("run_over", positions)

    def probe(self, index: int, start: int, stop: int) -> None:
        """Run the teacher over some samples of a shard."""
        self.work("probe", index, start, stop)

    def status(self) -> tuple[str, int, int]:
        """The current (what, done, total)."""
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
    """Plan a cache, write its missing shards with a pool of workers, and seal it.

    `make` builds a `SearchableBuilder`. Needs a Ray session.
    """
    each = worker_resources(options, device)
    pool = ActorPool(lambda: _actor(make, each), _actor(make, each), options)
    plan = plan_cache(pool, options, bars)
    _write_missing(cache, plan, pool, bars)
    return seal_cache(cache)


def _actor(make: Callable[[Progress], Any], resources: Mapping[str, float]) -> Any:
    # Two threads: one works, the other answers `status`. The pool restarts actors, not Ray.
    actor = ray.remote(ShardWorker).options(
        num_cpus=resources["CPU"],
        num_gpus=resources["GPU"],
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=2,
    )
    return actor.remote(make)


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
        _build_without_crashing(pool, index, sizes[index])
        done += sizes[index]
        bars.update("samples", done, plan.num_samples)
    if pool.losses:
        logger.warning("%d workers were lost: %s", len(pool.losses), "; ".join(pool.losses))


def _build_without_crashing(pool: ActorPool, index: int, num_samples: int) -> None:
    """Build a shard that has crashed two workers; reject the samples that crash a worker."""

    def survives(start: int, stop: int) -> bool:
        try:
            pool.call("probe", index, start, stop)
        except WorkerLostError:
            return False
        return True

    try:
        crashing = find_crashing_samples(survives, num_samples)
        pool.call("build_shard", index, crashing)
    except (WorkerLostError, TooManyDeathsError) as error:
        raise WorkerLostError(
            f"shard {index}: its workers keep dying, and no single sample explains it; are they "
            f"out of memory? Lower --batch-size or --num-workers. {error}"
        ) from error
