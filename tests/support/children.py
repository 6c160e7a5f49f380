"""Child processes that a test may kill, forked from one that has imported everything.

A new interpreter needs seconds to import torch and transformers. Python's fork server pays for
that once, and, other than pytest itself, it has a single thread when it forks.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = [
    "pipeline.build.build",
    "student_train.models.student",
    "student_train.training.run",
    "tests.support.runs",
]


def start(
    work: Callable[..., object],
    *arguments: object,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Begin `work(*arguments)` in a child; its exit code is 0 unless it raised or was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=_run, args=(dict(environment or {}), work, arguments))
    child.start()
    return child


def start_ranks(
    num_ranks: int, work: Callable[..., object], *arguments: object
) -> list[BaseProcess]:
    """Begin `work(*arguments)` in so many children, which are the ranks of one process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(work, *arguments, environment={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num_ranks)
    ]


def finish(*children: BaseProcess) -> list[int | None]:
    """Wait for children; returns their exit codes, None for one that hung and was killed."""
    codes: list[int | None] = []
    for child in children:
        child.join(timeout=100)
        codes.append(child.exitcode)
        if child.exitcode is None:
            child.kill()
            child.join()
    return codes


def run_script(module: str, *arguments: object) -> str:
    """What a module of `tests/support` prints when it runs as a script, without an error."""
    command = [sys.executable, "-m", f"tests.support.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_in_mid_run(log: Path, lines: int, work: Callable[..., object], *arguments: object) -> None:
    """Begin `work(*arguments)` in a child and kill it once `log` has so many lines."""
    kill_once_logged(log, lines, start(work, *arguments))


def kill_once_logged(log: Path, lines: int, *children: BaseProcess) -> None:
    """Kill children once `log` has so many lines, or the first of them has ended."""
    while children[0].is_alive() and not (
        log.exists() and len(log.read_text().splitlines()) >= lines
    ):
        time.sleep(0.002)
    for child in children:
        child.kill()
        child.join()


def _run(
    environment: Mapping[str, str], work: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    os.environ.update(environment)
    work(*arguments)
