"""Calls a function ahead of time in threads, in order and with bounded memory.

Promises: results come in the order of their arguments; an error is raised where its result is due,
after all earlier results; at most `depth` results, finished or not, wait to be taken; leaving the
iterator ends the threads. Threads help because zstd, xxhash, file access and most of torch and
numpy release the interpreter lock.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def read_ahead(
    load: Callable[[Argument], Result], arguments: Iterator[Argument], num_threads: int, depth: int
) -> Iterator[Result]:
    """Yield `load(argument)` in order; with 0 threads, compute each in this thread when it is due.

    `arguments` is read in this thread, at most `depth` ahead of the results. It may be finite.
    """
    if num_threads == 0:
        yield from map(load, arguments)
        return
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="read-ahead")
    try:
        waiting: deque[Future[Result]] = deque()
        for argument in arguments:
            waiting.append(pool.submit(load, argument))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
