"""Defines the callback with which a long call reports its progress."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done so far, total)."""


def no_progress(_what: str, _done: int, _total: int) -> None:
    """Report nothing."""
