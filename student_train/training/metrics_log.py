"""Writes a run's metrics.jsonl: one JSON line of means for each logging window.

A step occurs at most once, whatever was killed, resumed or raced, with the values of an
uninterrupted run (except `seconds`, which adds up over all attempts). A line holds a digest of
itself (checked_json.py); damaged lines are named and left out.
"""

import logging
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teacher_cache.schema.checked_json import from_checked_json, to_checked_json
from teacher_cache.schema.errors import DecodeError
from teacher_cache.storage.durable_files import write_atomic
from teacher_cache.storage.folder_owner import FolderOwner

logger = logging.getLogger(__name__)

METRICS_LOG_FILE = "metrics.jsonl"


class MeanWindow:
    """Sums and counts of named values since the last logged line; never waits for a device."""

    def __init__(self, sums: Mapping[str, tuple[float, int]] | None = None) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        for name, (total, count) in (sums or {}).items():
            self._sums[name] = torch.tensor(total, dtype=torch.float64)
            self._counts[name] = count

    def add(self, values: Mapping[str, Tensor | float], count: int = 1) -> None:
        """Add a value of each name; names may differ from call to call.

        A value that is one of several shares counts 1 once and 0 for the other shares.
        """
        for name, value in values.items():
            wide = torch.as_tensor(value).detach().to(torch.float64)
            self._sums[name] = self._sums.get(name, torch.zeros(())).to(wide) + wide
            self._counts[name] = self._counts.get(name, 0) + count

    def sums(self) -> dict[str, tuple[float, int]]:
        """Return (sum, count) of each name, as numbers."""
        return {name: (float(total), self._counts[name]) for name, total in self._sums.items()}


def merge_sums(windows: Iterable[Mapping[str, tuple[float, int]]]) -> dict[str, tuple[float, int]]:
    """Add up the sums and counts of several ranks."""
    merged: dict[str, tuple[float, int]] = {}
    for window in windows:
        for name, (total, count) in window.items():
            have, num = merged.get(name, (0.0, 0))
            merged[name] = (have + total, num + count)
    return merged


def means(sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Return sum over count of each name."""
    return {name: total / count for name, (total, count) in sums.items()}


class MetricsLog:
    """metrics.jsonl of a run that continues after `step`; drops lines of later, lost steps.

    Only the rank with an `owner` touches the file; the others only measure time. `expected`: lines
    up to `step`, as far as the checkpoint knows.
    """

    def __init__(
        self,
        run: Path,
        *,
        step: int,
        seconds: float,
        owner: FolderOwner | None,
        expected: int | None = None,
    ) -> None:
        self._path = run / METRICS_LOG_FILE
        self._owner = owner
        self._earlier = seconds
        self._started = time.monotonic()
        self.num_lines = 0
        if owner is None:
            return
        found = read_log(run)
        # Time of lost work counts too.
        self._earlier = max([seconds, *(line.get("seconds", 0.0) for line in found.lines)])
        self._rewrite([line for line in found.lines if line["step"] <= step])
        if found.damaged or (expected is not None and expected != self.num_lines):
            logger.warning(
                "%s: %d lines are damaged and %s of %d steps is expected to have %s lines, found "
                "%d; the run goes on without the others",
                *(self._path, found.damaged, METRICS_LOG_FILE, step, expected, self.num_lines),
            )

    @property
    def seconds(self) -> float:
        """Wall time of this attempt and of the logged part of earlier ones."""
        return self._earlier + time.monotonic() - self._started

    def append(self, line: Mapping[str, float]) -> None:
        """Add one line; it must hold `step` and `seconds`.

        FolderTakenError where another process has taken the run.
        """
        if self._owner is not None:
            self._owner.require()
            with self._path.open("a") as file:
                file.write(_line(line))
            self.num_lines += 1

    def settle(self) -> None:
        """Leave each step once, also where an overtaken process wrote a line at the same time."""
        if self._owner is not None:
            self._owner.require()
            self._rewrite(read_log(self._path.parent).lines)

    def _rewrite(self, lines: Iterable[Mapping[str, Any]]) -> None:
        each = {line["step"]: line for line in reversed([*lines])}  # the first of equal steps
        kept = [each[step] for step in sorted(each)]
        if kept or self._path.exists():
            write_atomic(self._path, "".join(map(_line, kept)).encode())
        self.num_lines = len(kept)


class FoundLog(NamedTuple):
    """The whole lines of a metrics.jsonl, and how many others were damaged."""

    lines: list[dict[str, Any]]
    damaged: int


def read_log(run: Path) -> FoundLog:
    """Read a run's metrics; a torn last line, which a kill leaves, is no damage."""
    path = run / METRICS_LOG_FILE
    data = path.read_bytes() if path.exists() else b""
    found = FoundLog([], 0)
    for text in data.split(b"\n")[:-1]:
        try:
            line = from_checked_json(text, str(path))
            numbers = all(
                value is None or isinstance(value, int | float) for value in line.values()
            )
            if not numbers or "step" not in line:
                raise DecodeError(f"{path}: a line has no step, or holds more than numbers")
        except DecodeError:
            found = found._replace(damaged=found.damaged + 1)
        else:
            found.lines.append(line)
    return found


def last_line(run: Path) -> dict[str, Any]:
    """Return the last line of a run's metrics; empty before the first."""
    lines = read_log(run).lines
    return lines[-1] if lines else {}


def logged_step(run: Path) -> int:
    """Return the last step in a run's metrics; 0 before the first line."""
    return int(last_line(run).get("step", 0))


def _line(values: Mapping[str, float | None]) -> str:
    finite = {
        name: None if value is None or not math.isfinite(value) else value
        for name, value in values.items()
    }
    return to_checked_json(finite) + "\n"
