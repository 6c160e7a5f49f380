"""Every point of a build at which something can go wrong, struck one at a time (support/faults.py).

After a kill or an error at any point the cache is refused or whole, never half there, and running
the same build again publishes the bytes of an undisturbed one. The counts are printed
at the end of the tests (tests/conftest.py).
"""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from teacher_cache.schema.options import ShardFormatName
from teacher_cache.storage import object_store
from teacher_cache.storage.object_store import ObjectStore
from tests.support.children import run_script
from tests.support.faults import require_refused_or_whole, small_build

FORMATS: tuple[ShardFormatName, ...] = ("arrow", "webdataset")
NAMES = {
    "kills": "kills",
    "calls": "kills before calls of the file system",
    "errors": "errors",
    "races": "kills of three racing builders",
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("kind", "at_least"), [("kills", 80), ("calls", 40), ("errors", 240), ("races", 20)]
)
def test_every_point_of_a_build_on_a_disk(
    memory_folder: Path,
    form: ShardFormatName,
    kind: str,
    at_least: int,
    record_property: Callable[[str, object], None],
) -> None:
    num_tries = int(run_script("faults", kind, memory_folder, form))
    record_property("tried", f"{num_tries} {NAMES[kind]} in a build of {form} shards")
    assert num_tries >= at_least


class Flaky:
    """The library of an object store, whose calls numbered in `bad` fail."""

    def __init__(self, files: Any, bad: Callable[[int], bool], lost_answer: bool) -> None:
        self._files, self._bad, self._lost_answer = files, bad, lost_answer
        self.num_calls = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        work = getattr(self._files, name)

        def call(*arguments: Any, **options: Any) -> Any:
            number, self.num_calls = self.num_calls, self.num_calls + 1
            if self._bad(number) and not self._lost_answer:
                raise OSError(f"503 SlowDown: {name}")
            result = work(*arguments, **options)
            if self._bad(number):
                raise TimeoutError(f"no answer to {name}")
            return result

        return call


def objects_of(url: str) -> dict[str, bytes]:
    """Every object of a cache that has a public name, by its name within the cache."""
    files = fsspec.filesystem("memory")
    root = url.removeprefix("memory:/")
    found = {name.removeprefix(root): files.cat_file(name) for name in files.find(root)}
    return {name: data for name, data in found.items() if "/." not in name}


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A place in fsspec's store in memory, with no pauses between attempts."""
    monkeypatch.setattr(object_store, "WAITS_S", (0.0, 0.0))
    monkeypatch.setenv(object_store.DOWNLOADS_VARIABLE, str(tmp_path / "downloads"))
    place = f"memory://{uuid.uuid4().hex}"
    yield place
    files = fsspec.filesystem("memory")
    if files.exists(place):
        files.rm(place, recursive=True)


def flaky_store(
    monkeypatch: pytest.MonkeyPatch, url: str, bad: Callable[[int], bool], lost_answer: bool
) -> tuple[ObjectStore, Flaky]:
    """A store at `url` whose library fails now and then."""
    store = ObjectStore(url)
    flaky = Flaky(fsspec.filesystem("memory"), bad, lost_answer)
    monkeypatch.setattr(store, "_files", lambda: flaky)
    return store, flaky


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("lost_answer", [False, True], ids=["refused", "answer-lost"])
@pytest.mark.parametrize("how_long", ["once", "for-good"])
def test_every_call_of_an_object_store(
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    form: ShardFormatName,
    lost_answer: bool,
    how_long: str,
    record_property: Callable[[str, object], None],
) -> None:
    store, calls = flaky_store(monkeypatch, f"{url}/undisturbed", lambda _: False, False)
    small_build(store, form)
    wanted, num_calls = objects_of(f"{url}/undisturbed"), calls.num_calls
    for number in range(num_calls):
        place = f"{url}/{number}"

        def bad(call: int, number: int = number) -> bool:
            return call == number if how_long == "once" else call >= number

        store, _ = flaky_store(monkeypatch, place, bad, lost_answer)
        if how_long == "once":
            small_build(store, form)
            assert objects_of(place) == wanted, number
        else:
            with pytest.raises(OSError, match="run the same command again"):
                small_build(store, form)
            for name, data in objects_of(place).items():
                assert data == wanted[name], (number, name)
            require_refused_or_whole(place)
            small_build(place, form)
            assert objects_of(place) == wanted, number
    what = "answers lost" if lost_answer else "calls refused"
    record_property("tried", f"{num_calls} {what} {how_long} in a build of {form} shards")
    assert num_calls > 20
