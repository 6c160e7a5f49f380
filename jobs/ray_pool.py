"""Ray as a place to run things: a session, and a small pool of actors that take numbered work.

Promises: every retry is bounded (Ray's defaults retry a crashing sample for ever); an exception in
a worker reaches the caller as itself, with its own message; work whose actor died is given to a
fresh one; nothing but work numbers and small records travels through Ray.
"""

import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayTaskError

from jobs.options import RayOptions

logger = logging.getLogger(__name__)


class WorkerLostError(RuntimeError):
    """A piece of work lost its worker more often than the retries allow."""


@contextmanager
def ray_session() -> Generator[None]:
    """Join the cluster that runs this job, or start a private one for the length of the block."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    ray.init(
        address=address,
        include_dashboard=False if address == "local" else None,
        log_to_driver=address != "local",
        logging_level=logging.WARNING,
    )
    try:
        yield
    finally:
        ray.shutdown()


def worker_resources(options: RayOptions, device: str) -> dict[str, float]:
    """What each worker reserves, by Ray's names; `device` is the stage's setting.

    Raises ValueError for what the cluster can never schedule: waiting for it would never end.
    """
    have = ray.cluster_resources()
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if device != "cpu" and have.get("GPU", 0) else 0.0
    each = {"CPU": options.cpus_per_worker, "GPU": gpus}
    for name, count in each.items():
        need = count * options.num_workers
        if need > have.get(name, 0):
            raise ValueError(
                f"{options.num_workers} workers need {need:g} {name}s, the Ray cluster has "
                f"{have.get(name, 0):g}; lower --num-workers or --{name.lower()}s-per-worker"
            )
    return each


def unwrap(error: RayTaskError) -> BaseException:
    """The exception that the remote code raised."""
    return error.cause if isinstance(error.cause, BaseException) else error


def get(reference: Any) -> Any:
    """`ray.get` that raises the worker's own exception."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise unwrap(error) from None


class ActorPool:
    """Actors of one plain class, each working on one number at a time.

    `make` builds a new actor; the first one may have been used already (to write a plan, say).
    """

    def __init__(self, make: Callable[[], Any], first: Any, options: RayOptions) -> None:
        self._make = make
        self._options = options
        self._idle = [first]

    def map(
        self,
        method: str,
        numbers: Sequence[int],
        on_poll: Callable[[Sequence[Any]], None],
        lost: list[int] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (number, result) as results come; `on_poll(actors)` is called twice a second.

        Work whose workers die more often than the retries allow ends it with `WorkerLostError`.
        With a list of `lost` numbers, one that has cost two workers goes there instead, and the
        others go on.
        """
        waiting = list(reversed(numbers))
        attempts = dict.fromkeys(numbers, 0)
        idle = self._idle
        num_workers = min(self._options.num_workers, len(numbers))
        idle += [self._make() for _ in range(num_workers - len(idle))]
        busy: dict[Any, tuple[int, Any]] = {}
        while waiting or busy:
            while idle and waiting:
                number, actor = waiting.pop(), idle.pop(0)
                busy[getattr(actor, method).remote(number)] = (number, actor)
            ready, _ = ray.wait(list(busy), timeout=0.5)
            on_poll([actor for reference, (_, actor) in busy.items() if reference not in ready])
            for reference in ready:
                number, actor = busy.pop(reference)
                try:
                    result = get(reference)
                except ActorDiedError as error:
                    attempts[number] += 1
                    if lost is not None and attempts[number] == 2:
                        lost.append(number)
                    elif attempts[number] > self._options.max_retries:
                        raise WorkerLostError(
                            f"{method}({number}): its worker died {attempts[number]} times; the "
                            f"last time: {error}"
                        ) from error
                    else:
                        waiting.append(number)
                    logger.warning("%s(%d): worker died, starting another", method, number)
                    idle.append(self._make())
                    continue
                idle.append(actor)
                yield number, result

    def call(self, method: str, *arguments: Any) -> Any:
        """Run one piece of work on one worker; `WorkerLostError` where that dies of it."""
        actor = self._idle.pop() if self._idle else self._make()
        try:
            result = get(getattr(actor, method).remote(*arguments))
        except ActorDiedError as error:
            raise WorkerLostError(f"{method}{arguments}: its worker died: {error}") from error
        self._idle.append(actor)
        return result
