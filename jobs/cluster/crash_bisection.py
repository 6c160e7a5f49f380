"""Finds the samples of a shard that kill the process that works on them, by halving.

A decoder that crashes, an image that takes all memory: no process can report its own death.

Promises: the number of deaths is bounded; a sample is named only if its process died with that
sample alone. Knows neither Ray nor teachers: `survives` does the work.
"""

from collections.abc import Callable

from teacher_cache.schema.errors import EmkdError

MAX_DEATHS = 32
"""Workers that a search may cost in one shard; three killers among 256 samples take at most 23."""


class TooManyDeathsError(EmkdError, RuntimeError):
    """Raised when a search for crashing samples costs more workers than `max_deaths`."""


def find_crashing_samples(
    survives: Callable[[int, int], bool], num_samples: int, max_deaths: int = MAX_DEATHS
) -> list[int]:
    """Positions of the samples that kill a worker on their own; a worker has died of the whole.

    `survives(start, stop)` has a worker run over those samples. The list is empty where no sample
    does it alone. Raises `TooManyDeathsError` at the death number `max_deaths`.
    """
    killers: list[int] = []
    suspects = [(0, num_samples)]  # ranges that a worker has died of, the first one last
    num_deaths = 0
    while suspects:
        start, stop = suspects.pop()
        if stop - start == 1:
            killers.append(start)
            continue
        middle = (start + stop) // 2
        for half in ((middle, stop), (start, middle)):
            if survives(*half):
                continue
            suspects.append(half)
            num_deaths += 1
            if num_deaths == max_deaths:
                raise TooManyDeathsError(
                    f"{num_deaths} workers died in the search; samples {killers} of the shard kill "
                    "a worker on their own, and there are more"
                )
    return killers
