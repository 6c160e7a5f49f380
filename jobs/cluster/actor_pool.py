"""Runs numbered work on a small pool of Ray actors, in a Ray session.

Every retry is bounded (Ray's defaults retry a crashing sample for ever). An exception in a worker
reaches the caller unchanged. Work whose actor died, hangs or cannot be reached goes to a new actor.
Only work numbers and small records travel through Ray.
"""

import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from jobs.cluster.options import RayOptions
from teacher_cache.schema.errors import EmkdError

logger = logging.getLogger(__name__)


class WorkerLostError(EmkdError, RuntimeError):
    """Raised when a piece of work lost its worker more often than the retries allow."""


@contextmanager
def ray_session() -> Generator[None]:
    """Join the cluster that runs this job, or start an embedded one that ends with the block."""
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
    """The resources that each worker reserves, under Ray's names; `device` is the stage's setting.

    Raises ValueError for resources that the cluster does not have: Ray would wait for ever.
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


def get(reference: Any) -> Any:
    """`ray.get` that raises the worker's own exception."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, BaseException) else error) from None


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """One piece of work on one actor, and the state that the actor last reported."""

    actor: Any
    reference: Any
    """The Ray reference of the result."""
    state: Any = None
    since: float
    """When `state` last changed, or when the work began (monotonic seconds)."""
    _question: Any = None

    def ask(self) -> None:
        """Read the answer to the last status call, if it has come, and call again; never waits."""
        if self._question is not None:
            if not ray.wait([self._question], timeout=0)[0]:
                return
            try:
                state = ray.get(self._question)
            except RayActorError:
                return  # its work raises the same error
            if state != self.state:
                self.state, self.since = state, time.monotonic()
        self._question = self.actor.status.remote()

    def hangs(self, seconds: float | None) -> bool:
        """Whether `state` has not changed for this many seconds."""
        return seconds is not None and time.monotonic() - self.since > seconds

    def result(self, timeout: float | None) -> Any:
        """The result of the work, or its own exception; `WorkerLostError` if the worker is gone."""
        if self.hangs(timeout) and not ray.wait([self.reference], timeout=0)[0]:
            ray.kill(self.actor)
            raise WorkerLostError(f"it made no progress for {timeout:g} s ({self.state})")
        try:
            return get(self.reference)
        except RayActorError as error:
            ray.kill(self.actor)  # it may only be unreachable, and must not come back
            raise WorkerLostError(f"it died: {error}") from error


class ActorPool:
    """Actors of one plain class, each working on one number at a time.

    `make` builds a new actor; `first` may have been used before (for example to write a plan).
    An actor's method `status` reports progress while another method runs. An actor whose status
    does not change for `options.worker_timeout` seconds is killed and counts as dead. Work goes
    only to actors that have started: if machines are gone, the others do the rest.
    """

    def __init__(self, make: Callable[[], Any], first: Any, options: RayOptions) -> None:
        self._make = make
        self._options = options
        self._idle = [first]
        self._coming: dict[Any, Any] = {}  # starting actors by the reference of their first status
        self._num_failed_starts = 0
        self.losses: list[str] = []
        """One line for each piece of work that was lost with its worker, in order."""

    def map(
        self,
        method: str,
        numbers: Sequence[int],
        on_poll: Callable[[Sequence[Any]], None],
        lost: list[int] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (number, result) as results arrive; call `on_poll(states)` twice a second.

        Raises `WorkerLostError` for work that loses its worker more often than the retries allow.
        With a list `lost`, a number that has lost two workers is appended to it instead, and the
        others go on.
        """
        waiting = list(reversed(numbers))
        num_losses = dict.fromkeys(numbers, 0)
        num_workers = min(self._options.num_workers, len(numbers))
        for _ in range(num_workers - len(self._idle) - len(self._coming)):
            self._recruit()
        busy: dict[int, _Attempt] = {}
        while waiting or busy:
            while self._idle and waiting:
                number = waiting.pop()
                busy[number] = self._start(method, number)
            for number in self._ended(busy, on_poll):
                attempt = busy.pop(number)
                try:
                    result = attempt.result(self._options.worker_timeout)
                except WorkerLostError as error:
                    num_losses[number] += 1
                    self._note(f"{method}({number})", error)
                    if lost is not None and num_losses[number] == 2:
                        lost.append(number)
                    elif num_losses[number] > self._options.max_retries:
                        raise WorkerLostError(
                            f"{method}({number}): its worker was lost {num_losses[number]} times; "
                            f"the last time {error}"
                        ) from error
                    else:
                        waiting.append(number)
                    self._recruit()
                    continue
                self._idle.append(attempt.actor)
                yield number, result

    def call(
        self,
        method: str,
        *arguments: Any,
        on_poll: Callable[[Sequence[Any]], None] = lambda _: None,
    ) -> Any:
        """Run one piece of work on one worker; `WorkerLostError` if the worker is lost."""
        if not self._idle and not self._coming:
            self._recruit()
        while not self._idle:
            self._ended({}, lambda _: None)
        attempt = self._start(method, *arguments)
        while not self._ended({0: attempt}, on_poll):
            pass
        try:
            result = attempt.result(self._options.worker_timeout)
        except WorkerLostError as error:
            work = f"{method}{_short(arguments)}"
            self._note(work, error)
            raise WorkerLostError(f"{work}: its worker was lost, {error}") from error
        self._idle.append(attempt.actor)
        return result

    def _start(self, method: str, *arguments: Any) -> _Attempt:
        actor = self._idle.pop(0)
        reference = getattr(actor, method).remote(*arguments)
        return _Attempt(actor=actor, reference=reference, since=time.monotonic())

    def _recruit(self) -> None:
        actor = self._make()
        self._coming[actor.status.remote()] = actor

    def _welcome(self, answer: Any) -> None:
        """Add an actor whose first status has arrived, or start another if it died."""
        actor = self._coming.pop(answer)
        try:
            get(answer)
        except RayActorError as error:
            self._num_failed_starts += 1
            if self._num_failed_starts > self._options.max_retries:
                raise WorkerLostError(f"new workers die before they start: {error}") from error
            self._recruit()
            return
        self._idle.append(actor)

    def _ended(
        self, busy: Mapping[int, _Attempt], on_poll: Callable[[Sequence[Any]], None]
    ) -> list[int]:
        """The numbers whose work has ended, with a result or an error; waits at most 0.5 s."""
        references = [*self._coming, *(attempt.reference for attempt in busy.values())]
        ready, _ = ray.wait(references, timeout=0.5)
        for answer in ready:
            if answer in self._coming:
                self._welcome(answer)
        running = [attempt for attempt in busy.values() if attempt.reference not in ready]
        for attempt in running:
            attempt.ask()
        on_poll([attempt.state for attempt in running if attempt.state is not None])
        timeout = self._options.worker_timeout
        return [
            number
            for number, attempt in busy.items()
            if attempt.reference in ready or attempt.hangs(timeout)
        ]

    def _note(self, work: str, error: WorkerLostError) -> None:
        self.losses.append(f"{work}: {error}")
        logger.warning("%s: its worker was lost, %s", work, error)


def _short(arguments: tuple[Any, ...]) -> str:
    text = repr(arguments)
    return text if len(text) <= 80 else f"{text[:80]} ...)"
