"""The demos' promise: killed anywhere and run again, they end with the same results."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

STAGES: dict[tuple[str, ...], tuple[str, ...]] = {
    (): ("teacher/final", "cache/SEALED.json", "runs/emkd-0/final"),
    ("--epic",): ("cache/SEALED.json", "runs/tcd-0/final", "runs/tcd-0/eval-dart-0.5/metrics.json"),
}
"""By flags of the demo: the stages after which it is killed."""
RUNS: dict[tuple[str, ...], list[str]] = {
    (): ["supervised", "rld", "emkd"],
    ("--epic",): ["epic-tcd", "supervised", "epic-tcd", "supervised"],
}


def _start(out: Path, flags: Sequence[str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "jobs.cli.__main__", "demo", "--smoke", "--seeds", "0"]
    return subprocess.Popen(
        [*command, *flags, "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _results(out: Path) -> Any:
    """results.json without what a clock wrote."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(item) for key, item in value.items() if key != "seconds"}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    return timeless(json.loads((out / "results.json").read_text()))


@pytest.mark.parametrize("flags", STAGES, ids=["em-kd", "epic"])
def test_killed_after_every_stage_it_ends_with_the_same_results(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    undisturbed = tmp_path / "undisturbed"
    assert _start(undisturbed, flags).wait() == 0
    before = (undisturbed / "results.json").read_bytes()
    assert _start(undisturbed, flags).wait() == 0  # run again, it finishes with what is there
    assert (undisturbed / "results.json").read_bytes() == before

    killed, draws = tmp_path / "killed", random.Random(3)
    for stage in STAGES[flags]:
        process = _start(killed, flags)
        while process.poll() is None and not (killed / stage).exists():
            time.sleep(0.05)
        time.sleep(draws.uniform(0, 2))  # somewhere in the next stage
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert _start(killed, flags).wait() == 0
    results = _results(killed)
    assert results == _results(undisturbed)
    assert [run["objective"] for run in results["runs"]] == RUNS[flags]
    assert results["cache"]["samples"] == 128
    assert "<html" in (killed / "report.html").read_text()
