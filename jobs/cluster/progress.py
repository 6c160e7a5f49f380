"""Shows the progress of commands on stderr."""

from typing import Any

from tqdm import tqdm


class ProgressBars:
    """Shows (what, done, total) as tqdm bars, one at a time; a context manager.

    A new `what` closes the bar before it; a finished `what` is not shown again.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._what = ""
        self._finished: set[str] = set()

    def __enter__(self) -> "ProgressBars":
        return self

    def __exit__(self, *_error: object) -> None:
        self._close()

    def update(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        if what in self._finished:
            return
        if what != self._what or self._bar is None:
            self._close()
            self._what = what
            self._bar = tqdm(total=total, initial=done, desc=what, mininterval=0.5)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._finished.add(what)
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
