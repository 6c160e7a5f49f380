"""How a long call tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (shards that are there, shards in all)."""


def no_progress(_done: int, _total: int) -> None:
    """Report nothing."""
