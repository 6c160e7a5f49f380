"""Writes a run's metrics.jsonl: one JSON line of means for each logging window.

A step occurs at most once, whatever was killed and resumed, with the values of an uninterrupted run
(except `seconds`, which adds up over all attempts).
"""

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teacher_cache.storage.durable_files import write_atomic

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

    Only the rank that `writes` touches the file; the others only measure time.
    """

    def __init__(self, run: Path, *, step: int, seconds: float, writes: bool) -> None:
        self._path = run / METRICS_LOG_FILE
        self._writes = writes
        self._earlier = seconds
        self._started = time.monotonic()
        if writes and self._path.exists():
            lines = _read_lines(self._path)
            kept = [line for line in lines if line["step"] <= step]
            write_atomic(self._path, "".join(map(_line, kept)).encode())
            # Time of lost work counts too.
            self._earlier = max([seconds, *(line["seconds"] for line in lines)])

    @property
    def seconds(self) -> float:
        """Wall time of this attempt and of the logged part of earlier ones."""
        return self._earlier + time.monotonic() - self._started

    def append(self, line: Mapping[str, float]) -> None:
        """Add one line; it must hold `step` and `seconds`."""
        if self._writes:
            with self._path.open("a") as file:
                file.write(_line(line))


def last_line(run: Path) -> dict[str, Any]:
    """Return the last line of a run's metrics; empty before the first."""
    path = run / METRICS_LOG_FILE
    lines = _read_lines(path) if path.exists() else []
    return lines[-1] if lines else {}


def logged_step(run: Path) -> int:
    """Return the last step in a run's metrics; 0 before the first line."""
    return int(last_line(run).get("step", 0))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    whole, _, _ = path.read_text().rpartition("\n")  # a kill can cut off only the last line
    return [json.loads(line) for line in whole.splitlines()]


def _line(values: Mapping[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps(finite) + "\n"
