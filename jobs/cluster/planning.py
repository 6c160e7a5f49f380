"""Plans a cache in the worker pool, and finds the samples that crash or hang the worker.

A worker writes the plan: it reads every sample of the source and calibrates. If two workers are
lost at it, windows of samples are tried apart, first reading alone, then the teacher over the
samples of calibration; a window that loses its worker is halved (crash_bisection.py). The samples
found are left to the builder, which rejects or refuses them by name.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from jobs.cluster.actor_pool import WorkerLostError
from jobs.cluster.crash_bisection import MAX_DEATHS, TooManyDeathsError, find_crashing_samples
from jobs.cluster.options import RayOptions
from jobs.cluster.progress import ProgressBars
from teacher_cache.schema.manifest import Plan

NUM_READ = 4096
"""Samples of one window that is only read."""
NUM_RUN = 64
"""Samples of one window that the teacher runs over."""


@runtime_checkable
class Caller(Protocol):
    """What planning needs of an `ActorPool`."""

    losses: list[str]

    def call(
        self, method: str, *arguments: Any, on_poll: Callable[[Sequence[Any]], None] = ...
    ) -> Any:
        """Run one piece of work on one worker; `WorkerLostError` if the worker is lost."""
        ...


def plan_cache(pool: Caller, options: RayOptions, bars: ProgressBars) -> Plan:
    """The plan, written by a worker; `WorkerLostError` if no sample explains the crashes."""

    def show(states: Sequence[tuple[str, int, int]]) -> None:
        for state in states:
            bars.update(*state)

    def prepare(unreadable: Sequence[int], crashing: Sequence[int]) -> Plan | None:
        for _ in range(2):
            try:
                return pool.call("prepare", unreadable, crashing, on_poll=show)
            except WorkerLostError:
                if options.max_retries == 0:
                    raise
        return None

    plan = prepare([], [])
    if plan is not None:
        return plan
    pool.call("run_over", [])  # a teacher that cannot be loaded is no sample's fault
    try:
        unreadable = _find_unreadable(pool)
        plan = prepare(unreadable, []) if unreadable else None
        if plan is None:
            crashing = _find_crashing(pool, unreadable)
            plan = prepare(unreadable, crashing) if crashing else None
    except TooManyDeathsError as error:
        raise WorkerLostError(f"planning: its workers keep dying. {error}") from error
    if plan is None:
        raise WorkerLostError(
            "planning: its workers keep dying, and no single sample explains it; are they out of "
            f"memory? Lower --batch-size. The losses: {'; '.join(pool.losses)}"
        )
    return plan


def _find_unreadable(pool: Caller) -> list[int]:
    """Positions in the source of samples that crash or hang a worker that reads them."""
    positions = range(pool.call("num_to_read"))
    return _find(positions, NUM_READ, lambda some: _survives(pool, "read_only", some))


def _find_crashing(pool: Caller, unreadable: Sequence[int]) -> list[int]:
    """Positions of samples that crash or hang a worker that runs the teacher over them."""
    order, wanted = pool.call("calibration_order", unreadable)
    wanted = None if wanted is None else 2 * wanted  # what is tried first counts otherwise
    num_tokens = 0

    def survives(some: Sequence[int]) -> bool:
        nonlocal num_tokens
        if wanted is not None and num_tokens >= wanted:
            return True  # calibration comes no further
        try:
            num_tokens += pool.call("run_over", list(some))
        except WorkerLostError:
            return False
        return True

    return _find(order, NUM_RUN, survives)


def _find(
    positions: Sequence[int], window: int, survives: Callable[[Sequence[int]], bool]
) -> list[int]:
    found: list[int] = []
    for first in range(0, len(positions), window):
        some = positions[first : first + window]
        if not survives(some):
            each = find_crashing_samples(lambda a, b, s=some: survives(s[a:b]), len(some))
            found += [some[place] for place in each]
        if len(found) > MAX_DEATHS:
            raise TooManyDeathsError(
                f"samples {found[:MAX_DEATHS]} of the source crash a worker on their own, and "
                "there are more"
            )
    return found


def _survives(pool: Caller, method: str, argument: Any) -> bool:
    try:
        pool.call(method, argument)
    except WorkerLostError:
        return False
    return True
