"""Shows the progress of commands on stderr: a bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

SECONDS_PER_LINE = 30.0
"""Without a terminal, a task prints one line in this time, and one when it is done."""

_LINE = "{desc}: {n_fmt} of {total_fmt} ({percentage:.0f} %), {rate_fmt}, {remaining} left{postfix}"


class ProgressBars:
    """Shows (what, done, total), one task at a time; a context manager.

    A new `what` ends the task before it; a finished `what` is not shown again.
    """

    def __init__(self) -> None:
        self._on_terminal = sys.stderr.isatty()
        self._bar: Any = None
        self._finished: set[str] = set()
        self._loss = ""
        self._what, self._initial, self._started, self._printed = "", 0, 0.0, 0.0

    def __enter__(self) -> "ProgressBars":
        return self

    def __exit__(self, *_error: object) -> None:
        self._close()

    def update(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        if what in self._finished:
            return
        if what != self._what:
            self._close()
            self._what, self._initial = what, done
            self._started = self._printed = time.monotonic()
        if done >= total:
            self._finished.add(what)
        if self._on_terminal:
            self._draw(done, total)
        else:
            self._print(done, total)
        if done >= total:
            self._close()

    def metrics(self, line: Mapping[str, Any]) -> None:
        """Show the loss of a line of a run's metrics beside the progress."""
        loss = line.get("loss")
        self._loss = "" if loss is None else f"loss {loss:.4g}"

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, initial=done, desc=self._what, mininterval=0.5)
        self._bar.total = total
        self._bar.set_postfix_str(self._loss, refresh=False)
        self._bar.update(done - self._bar.n)

    def _print(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._printed < SECONDS_PER_LINE:
            return
        self._printed = now
        line = tqdm.format_meter(
            done,
            total,
            now - self._started,
            prefix=self._what,
            postfix=self._loss,
            initial=self._initial,
            bar_format=_LINE,
        )
        print(line, file=sys.stderr, flush=True)

    def _close(self) -> None:
        self._what = ""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
