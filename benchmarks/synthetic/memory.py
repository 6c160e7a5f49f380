"""Measures the peak memory of a call in a process of its own."""

import ctypes
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")


def status_mib(field: str) -> float:
    """A field of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def in_child(work: Callable[[], Found]) -> Found:
    """What `work` returns in a forked child, which has none of our threads."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: theirs.send(work()))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        child.join()


def return_freed_memory() -> None:
    """Let glibc map every larger block and unmap it when freed, here and in children.

    Call it before anything is allocated: free heap memory would be reused.
    """
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """glibc's usual state: freed blocks of up to 32 MiB are reused."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**25)
    libc.mallopt(-1, 2**26)  # M_TRIM_THRESHOLD


def peak_mib(work: Callable[[], object], before: Callable[[], object]) -> float:
    """How much `work` adds to the resident set at its peak, in a child (`return_freed_memory`).

    `before` runs first, so that code loaded on first use does not count.
    """

    def measure() -> float:
        before()
        Path("/proc/self/clear_refs").write_text("5")
        resident = status_mib("VmRSS")
        work()
        return status_mib("VmHWM") - resident

    return in_child(measure)
