"""Every point at which a build changes a disk, and all that can go wrong there.

The points are the calls of `durable_files.STEPS` and, between them, every row written into a
shard. A *kill* ends the process just before a step, just after it, or half-way through its bytes;
an *error* is raised there instead. Each try begins with an empty folder: the build is struck, a
reader is refused or reads everything, nothing that has a public name is half there, and the same
build, run again, publishes byte for byte what an undisturbed one does.

Run as a script (`python -m tests.faults kills|errors|races FOLDER FORMAT`) it forks builders from
one warm process; it prints how many tries there were, and fails by an assertion.
"""

import functools
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


def points_of(steps: list[str]) -> list[Point]:
    """Before, after and, where bytes are written, half-way through every step."""
    whens = [("before", "half-way", "after") if s in WRITES else ("before", "after") for s in steps]
    return [(number, when) for number, moments in enumerate(whens) for when in moments]


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
    watch = Watch()
    with watch():
        small_build(folder / "undisturbed", form)
    wanted = published(folder / "undisturbed")
    points = points_of(watch.steps)
    for point in points:
        cache = folder / f"{point[0]}-{point[1]}"
        struck(cache, point)
        for name, data in published(cache).items():
            assert data == wanted[name], f"{point}: {name} is not what it should be"
        require_refused_or_whole(cache)
        small_build(cache, form)
        assert published(cache) == wanted, f"{point}: the second build"
    return len(points)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kills(folder: Path, form: ShardFormatName) -> int:
    def struck(cache: Path, point: Point) -> None:
        def work() -> None:
            with Watch(point, _die)():
                small_build(cache, form)

        assert exit_status(forked(work)) == signal.SIGKILL, point

    return try_every_point(folder, form, struck)


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
    """Three builders at once in one folder, all doomed to die somewhere, until one gets through."""
    folder.mkdir(parents=True, exist_ok=True)
    watch = Watch()
    with watch():
        small_build(folder / "undisturbed", form)
    wanted = published(folder / "undisturbed")
    points = points_of(watch.steps)
    num_kills = 0
    for seed in range(NUM_RACES):
        draws, cache = random.Random(seed), folder / f"race-{seed}"
        finished = False
        while not finished:

            def work(point: Point, cache: Path = cache) -> None:
                with Watch(point, _die)():
                    small_build(cache, form)

            doomed = [draws.choice(points) for _ in range(3)]
            children = [forked(functools.partial(work, point)) for point in doomed]
            statuses = [exit_status(child) for child in children]
            assert set(statuses) <= {0, signal.SIGKILL}
            require_refused_or_whole(cache)
            num_kills += statuses.count(signal.SIGKILL)
            finished = 0 in statuses
        found = published(cache)
        assert {name: found[name] for name in wanted} == wanted, f"seed {seed}"
    return num_kills


if __name__ == "__main__":
    tried = {"kills": _kills, "errors": _errors, "races": _races}[sys.argv[1]](
        Path(sys.argv[2]), "arrow" if sys.argv[3] == "arrow" else "webdataset"
    )
    sys.stdout.write(f"{tried}\n")
