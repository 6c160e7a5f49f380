"""Finds the samples of a shard that crash the worker that handles them, by bisection.

A sample that crashes its worker (a decoder crashes, an image takes all memory) becomes a rejected
sample, which the shard's commit record and the seal list. The number of crashes is bounded. A
sample is named only if a worker crashed with that sample alone.
"""

from collections.abc import Callable

from teacher_cache.schema.errors import EmkdError

MAX_DEATHS = 32
"""Most crashes of a search in one shard; 3 crashing samples among 256 take at most 23."""


class TooManyDeathsError(EmkdError, RuntimeError):
    """Raised when a search for crashing samples costs more workers than `max_deaths`."""


def find_crashing_samples(
    survives: Callable[[int, int], bool], num_samples: int, max_deaths: int = MAX_DEATHS
) -> list[int]:
    """Positions of the samples that crash a worker on their own.

    Assumes that the whole shard has already crashed a worker. `survives(start, stop)` runs a worker
    over these samples. The list is empty if no sample crashes a worker alone. Raises
    `TooManyDeathsError` at crash number `max_deaths`.
    """
    crashing: list[int] = []
    suspects = [(0, num_samples)]  # ranges that have crashed a worker, the first one last
    num_deaths = 0
    while suspects:
        start, stop = suspects.pop()
        if stop - start == 1:
            crashing.append(start)
            continue
        middle = (start + stop) // 2
        for half in ((middle, stop), (start, middle)):
            if survives(*half):
                continue
            suspects.append(half)
            num_deaths += 1
            if num_deaths == max_deaths:
                raise TooManyDeathsError(
                    f"{num_deaths} workers died in the search; samples {crashing} of the shard "
                    "crash a worker on their own, and there are more"
                )
    return crashing
