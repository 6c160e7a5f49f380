"""Calls a function ahead of time in threads, in order and within a bound.

Promises: results come in the order of their arguments, whatever thread was quicker; an error is
raised where its result is due, after all that come before it; at most `depth` results exist that
nobody has taken, finished or not, so memory is bounded by `depth` results and what `num_threads`
calls need while they run; leaving the iterator ends the threads. zstd, xxhash, file access and
most of torch and numpy run without the interpreter lock, so that the threads do work meanwhile.
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
    """`load` of every argument, in order; with 0 threads in this one, when asked for it.

    `arguments` are taken in this thread, at most `depth` before their result is. They may end.
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
