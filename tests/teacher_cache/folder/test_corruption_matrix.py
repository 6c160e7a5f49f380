"""Every kind of file, every region, every kind of damage: found and named, and never read silently.

For each damage of a sealed cache two things must hold: `verify` reports it (or refuses the cache)
and names the file, and a reader raises an error or returns exactly what was written. The number
of damages that were tried is printed at the end of the tests.
"""

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.verify import verify_cache
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.schema.teacher_output import CachedSample
from tests.support.faults import small_build
from tests.support.paths import IN_MEMORY
from tests.support.strategies import assert_same
from tests.teacher_cache.folder.test_fault_matrix import FORMATS

Damage = tuple[str, bytes | None]
"""What was done to a file, and its bytes then; None where it is gone."""

NUM_FLIPS = 60
"""Single bits flipped in one file, spread over all of it; all bytes where it has fewer."""


def sealed(folder: Path, form: ShardFormatName, first: int = 0) -> dict[str, CachedSample]:
    """A cache of two shards and an LM head; what is in it, by key."""
    return {cached.sample.key: cached for cached in small_build(folder, form, first)}


def flips(data: bytes) -> Iterator[Damage]:
    """One bit flipped: at the first and last bytes, and spread over the rest."""
    draws = random.Random(len(data))
    step = max(1, len(data) // NUM_FLIPS)
    places = {0, 1, len(data) - 2, len(data) - 1} | set(range(0, len(data), step))
    for place in sorted(places):
        bit = 1 << draws.randrange(8)
        yield (
            f"bit {bit} of byte {place} flipped",
            data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :],
        )


def cuts(data: bytes) -> Iterator[Damage]:
    """Cut off, emptied, overwritten with zeros from somewhere on, or grown."""
    for size in sorted({0, 1, len(data) // 4, len(data) // 2, len(data) - 512, len(data) - 1}):
        if 0 <= size < len(data):
            yield f"cut to {size} bytes", data[:size]
            if any(data[size:]):
                yield f"zeros from byte {size}", data[:size] + bytes(len(data) - size)
    yield "one byte more", data + b"\n"
    yield "twice", data + data
    yield "deleted", None


def damages(name: str, files: dict[str, bytes], foreign: dict[str, bytes]) -> Iterator[Damage]:
    """All that is done to one file; `foreign` are the files of another cache of the same shape."""
    yield from flips(files[name])
    yield from cuts(files[name])
    folder = name.split("/")[0]
    for other in files:
        if other != name and other.split("/")[0] == folder and files[other] != files[name]:
            yield f"replaced by {other}", files[other]
    for other in foreign:
        if other.split("/")[0] == folder and foreign[other] != files[name]:
            yield f"replaced by {other} of another cache", foreign[other]


def require_found(cache: Path, name: str, what: str) -> None:
    """`verify` finds the damage and names the file."""
    try:
        problems = "\n".join(verify_cache(cache).problems)
    except ValueError as error:
        problems = str(error)
    assert problems, f"{name}, {what}: verify found nothing"
    assert name.split("/")[-1].split(".")[0] in problems, f"{name}, {what}: {problems}"


def require_never_silent(cache: Path, wanted: dict[str, CachedSample], what: str) -> None:
    """A reader raises ValueError, or returns what was written: all of it."""
    try:
        reader = CacheReader.open(cache)
        found = [reader.read(index, reader.parts) for index in range(len(reader))]
        reader.head()
    except ValueError:
        return
    assert [cached.sample.key for cached in found] == list(wanted), what
    for cached in found:
        assert_same(cached, wanted[cached.sample.key])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "kind", ["plan.json", "SEALED.json", "commits", "shards", "head.safetensors"]
)
def test_every_damage_is_found_and_none_is_read(
    tmp_path: Path,
    form: ShardFormatName,
    kind: str,
    record_property: Callable[[str, object], None],
) -> None:
    wanted = sealed(tmp_path / "cache", form)
    sealed(tmp_path / "foreign", form, first=10)
    files, foreign = (
        {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*.*"))}
        for root in (tmp_path / "cache", tmp_path / "foreign")
    )
    in_memory = IN_MEMORY if IN_MEMORY.is_dir() else None
    num_tries = 0
    with tempfile.TemporaryDirectory(dir=in_memory) as scratch:
        cache = Path(scratch) / "cache"
        shutil.copytree(tmp_path / "cache", cache)
        for name in (name for name in files if name.split("/")[0] == kind):
            for what, data in damages(name, files, foreign):
                (cache / name).unlink()
                if data is not None:
                    (cache / name).write_bytes(data)
                require_found(cache, name, what)
                require_never_silent(cache, wanted, f"{name}, {what}")
                num_tries += 1
                (cache / name).write_bytes(files[name])
        assert not verify_cache(cache).problems
    record_property("tried", f"{num_tries} damages of {kind} beside {form} shards, 0 silent")
    assert num_tries > NUM_FLIPS


@pytest.mark.parametrize("form", FORMATS)
def test_two_shards_or_two_records_swapped_are_found(tmp_path: Path, form: ShardFormatName) -> None:
    for kind in ("shards", "commits"):
        cache = tmp_path / kind
        wanted = sealed(cache, form)
        first, second = sorted((cache / kind).iterdir())
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
        require_found(cache, f"{kind}/{first.name}", "swapped")
        require_never_silent(cache, wanted, f"{kind} swapped")
