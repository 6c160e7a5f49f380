"""Every point at which a build changes a disk, and all that can go wrong there.

The points are the calls of `durable_files.STEPS` and, between them, every row written into a
shard. A *kill* ends the process just before a step, just after it, or half-way through its bytes;
an *error* is raised there instead. Each try begins with an empty folder: the build is struck, a
reader is refused or reads everything, nothing that has a public name is half there, and the same
build, run again, publishes byte for byte what an undisturbed one does.

Run as a script (`python -m tests.support.faults KIND FOLDER FORMAT`, KIND a key of `KINDS`) it
forks builders from one process that has loaded everything. It prints the number of tries, and fails
by an assertion.
"""

import os
import random
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from errno import EACCES, EIO, ENOSPC
from pathlib import Path
from typing import Any

import pytest
import torch

from teacher_cache.folder.reader import CacheReader
from teacher_cache.records.lm_head import LmHead
from teacher_cache.schema.errors import IncompleteCacheError
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.shards.arrow import ArrowFormat
from teacher_cache.shards.webdataset import WebDatasetFormat
from teacher_cache.storage import durable_files
from teacher_cache.storage.store import Location
from tests.support.builders import build, exit_status, forked, published
from tests.support.strategies import VOCAB_SIZE, WIDTH, make_cached, make_spec

HEAD = LmHead(weight=torch.arange(VOCAB_SIZE * WIDTH).reshape(VOCAB_SIZE, WIDTH) / 7)
NUM_SHARDS = 2
NUM_RACES = 12
WRITES = ("write_new",)
"""Steps that can stop half-way."""
Point = tuple[int, str]
"""Number of the step, and when: before, half-way, after."""
Fault = Callable[[], None]


def small_build(cache: Location, form: ShardFormatName, first: int = 0) -> list[CachedSample]:
    """A build with everything in it: plan, asset, shards, seal; returns its rows."""
    rows = [make_cached(first + number, "hidden") for number in range(2 * NUM_SHARDS)]
    shards = [rows[start : start + 2] for start in range(0, len(rows), 2)]
    build(cache, shards, form, make_spec("hidden", head_digest=HEAD.digest), head=HEAD)
    return rows


class Watch:
    """Notes the steps of a build as they are taken, and strikes at one point."""

    def __init__(self, point: Point | None = None, fault: Fault | None = None) -> None:
        self.steps: list[str] = []
        self._point, self._fault = point, fault

    def step(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, watched as a step."""

        def watched(*arguments: Any) -> Any:
            number = len(self.steps)
            self.steps.append(name)
            self._strike((number, "before"))
            if (number, "half-way") == self._point:
                if name in WRITES:
                    path, data = arguments
                    work(path, data[: len(data) // 2])
                self._strike((number, "half-way"))
            result = work(*arguments)
            self._strike((number, "after"))
            return result

        return watched

    def write(self, write: Callable[..., None]) -> Callable[..., None]:
        """A format's `write`, in which every row, and the end of the file, is a step."""
        pause = self.step("row", lambda: None)

        def watched(form: object, path: Path, rows: Iterable[Any], *rest: Any) -> None:
            def counted() -> Iterator[Any]:
                for row in rows:
                    pause()
                    yield row

            write(form, path, counted(), *rest)
            pause()

        return watched

    def _strike(self, here: Point) -> None:
        if here == self._point and self._fault is not None:
            self._fault()

    @contextmanager
    def __call__(self) -> Generator[None]:
        """Let every step pass by here."""
        steps = {name: getattr(durable_files, name) for name in durable_files.STEPS}
        formats: dict[Any, Any] = {form: form.write for form in (ArrowFormat, WebDatasetFormat)}
        try:
            for name, work in steps.items():
                setattr(durable_files, name, self.step(name, work))
            for form, write in formats.items():
                form.write = self.write(write)
            yield
        finally:
            for name, work in steps.items():
                setattr(durable_files, name, work)
            for form, write in formats.items():
                form.write = write


def points_of(work: Callable[..., object], *arguments: object) -> list[Point]:
    """Before, after and, where bytes are written, half-way through every step of the work."""
    watch = Watch()
    with watch():
        work(*arguments)
    return [
        (number, when)
        for number, step in enumerate(watch.steps)
        for when in ("before", *(["half-way"] if step in WRITES else []), "after")
    ]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def doomed(point: Point, work: Callable[..., object], *arguments: object) -> None:
    """`work(*arguments)`; the process dies at this point."""
    with Watch(point, die)():
        work(*arguments)


def kill_at(point: Point, work: Callable[..., object], *arguments: object) -> None:
    """Run `work(*arguments)` in a child that dies at this point."""
    assert exit_status(forked(doomed, point, work, *arguments)) == signal.SIGKILL, point


def require_refused_or_whole(cache: Location) -> None:
    """A reader is refused (IncompleteCacheError), or reads every sample."""
    try:
        reader = CacheReader.open(cache)
    except IncompleteCacheError:
        return
    assert len(reader) == 2 * NUM_SHARDS
    for index in range(len(reader)):
        reader.read(index, reader.parts)


def try_every_point(
    folder: Path, form: ShardFormatName, struck: Callable[[Path, Point], None]
) -> int:
    """Strike at each point of a build of its own; returns how many there were."""
    folder.mkdir(parents=True, exist_ok=True)  # so that every build makes the same folders
    points = points_of(small_build, folder / "undisturbed", form)
    wanted = published(folder / "undisturbed")
    for point in points:
        cache = folder / f"{point[0]}-{point[1]}"
        struck(cache, point)
        for name, data in published(cache).items():
            assert data == wanted[name], f"{point}: {name} is not what it should be"
        require_refused_or_whole(cache)
        small_build(cache, form)
        assert published(cache) == wanted, f"{point}: the second build"
    return len(points)


def _kills(folder: Path, form: ShardFormatName) -> int:
    return try_every_point(folder, form, lambda cache, at: kill_at(at, small_build, cache, form))


def _doomed_call(number: int, cache: Path, form: ShardFormatName) -> None:
    """A build that dies just before its `number`th call of the file system."""
    left = number

    def hook(event: str, _arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in ("open", "os.link", "os.rename", "os.remove", "os.mkdir"):
            left -= 1
            if left < 0:
                die()

    sys.addaudithook(hook)
    small_build(cache, form)


def _calls(folder: Path, form: ShardFormatName) -> int:
    """Kill a build before each call of the file system, whether or not it is one of `STEPS`."""
    small_build(folder / "undisturbed", form)
    wanted, number, killed = published(folder / "undisturbed"), 0, True
    while killed:
        cache = folder / f"{number}"
        killed = exit_status(forked(_doomed_call, number, cache, form)) == signal.SIGKILL
        small_build(cache, form)
        assert published(cache) == wanted, f"killed before call {number}"
        number += 1
    return number


def _errors(folder: Path, form: ShardFormatName) -> int:
    num_tries = 0
    for number in (ENOSPC, EACCES, EIO):

        def fail(number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        def struck(cache: Path, point: Point, fail: Fault = fail, number: int = number) -> None:
            with pytest.raises(OSError) as raised, Watch(point, fail)():  # noqa: PT011
                small_build(cache, form)
            assert raised.value.errno == number, point

        num_tries += try_every_point(folder / str(number), form, struck)
    return num_tries


def _races(folder: Path, form: ShardFormatName) -> int:
    """Four builders at once in one folder; and three that die somewhere, until one ends."""
    points = points_of(small_build, folder / "undisturbed", form)
    wanted = published(folder / "undisturbed")
    children = [forked(small_build, folder / "crowd", form) for _ in range(4)]
    assert [exit_status(child) for child in children] == [0] * 4
    assert published(folder / "crowd") == wanted
    num_kills = 0
    for seed in range(NUM_RACES):
        draws, cache = random.Random(seed), folder / f"race-{seed}"
        finished = False
        while not finished:
            ends = [draws.choice(points) for _ in range(3)]
            children = [forked(doomed, point, small_build, cache, form) for point in ends]
            statuses = [exit_status(child) for child in children]
            assert set(statuses) <= {0, signal.SIGKILL}
            require_refused_or_whole(cache)
            num_kills += statuses.count(signal.SIGKILL)
            finished = 0 in statuses
        found = published(cache)
        assert {name: found[name] for name in wanted} == wanted, f"seed {seed}"
    return num_kills


KINDS = {"kills": _kills, "calls": _calls, "errors": _errors, "races": _races}

if __name__ == "__main__":
    form: ShardFormatName = "arrow" if sys.argv[3] == "arrow" else "webdataset"
    sys.stdout.write(f"{KINDS[sys.argv[1]](Path(sys.argv[2]), form)}\n")
