"""Promises of jobs/cluster/progress.py: a bar on a terminal, else few lines, none of them torn."""

import io
import sys

import pytest

from jobs.cluster import progress
from jobs.cluster.progress import ProgressBars


class Clock:
    """A clock that tests set."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_without_a_terminal_one_line_is_printed_every_30_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBars() as bars:
        bars.metrics({"loss": 2.34567})
        for step in range(1, 101):  # a second each
            bars.update("steps", step, 100)
            clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    shown = ["31 of 100 (31 %)", "61 of 100 (61 %)", "91 of 100 (91 %)", "100 of 100 (100 %)"]
    assert [line.split(",")[0] for line in lines] == [f"steps: {each}" for each in shown]
    assert "loss 2.346" in lines[0]
    assert "1.00it/s" in lines[0]
    assert "01:09 left" in lines[0]
    assert not any("\r" in line for line in lines)


def test_a_resumed_task_has_the_speed_of_its_own_steps(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBars() as bars:
        bars.update("steps", 1000, 1100)
        clock.now += 50
        bars.update("steps", 1050, 1100)
    assert "1.00it/s, 00:50 left" in capsys.readouterr().err


def test_a_task_that_ends_is_shown_at_100_percent_once(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBars() as bars:
        for done, total in ((10, 64), (40, 64), (40, 40), (40, 40)):
            bars.update("calibrate", done, total)
        bars.update("samples", 0, 0)
    lines = capsys.readouterr().err.splitlines()
    shown = ["calibrate: 40 of 40 (100 %)", "samples: 0 of 0 (0 %)"]
    assert [line.split(",")[0] for line in lines] == shown


def test_on_a_terminal_a_bar_has_loss_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBars() as bars:
        bars.update("steps", 0, 2)
        bars.metrics({"loss": None})
        bars.update("steps", 1, 2)
        bars.metrics({"loss": 0.5})
        bars.update("steps", 2, 2)
    last = terminal.getvalue().rstrip("\n").split("\r")[-1]
    assert "100%" in last
    assert "loss 0.5" in last
    assert "it/s" in last
