"""Progress bars of the commands: one line for each thing that is being done, on stderr."""

from types import TracebackType
from typing import Any

from tqdm import tqdm


class Bars:
    """Turns (what, done, total) into tqdm bars; a context manager that closes them."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> "Bars":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for bar in self._bars.values():
            bar.close()

    def update(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done; a finished bar stays on the screen."""
        bar = self._bars.get(what)
        if bar is None:
            bar = self._bars[what] = tqdm(total=total, desc=what, mininterval=0.5)
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            del self._bars[what]
