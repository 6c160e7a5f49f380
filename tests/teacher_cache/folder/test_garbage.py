"""Leftovers go, once they are old enough; what is referred to, or is not ours, stays."""

import json
import os
import time
from pathlib import Path

import pytest

from jobs.cli.__main__ import main
from teacher_cache.folder.garbage import collect_garbage
from teacher_cache.folder.verify import verify_cache
from teacher_cache.folder.writer import write_plan
from teacher_cache.schema.errors import IncompleteCacheError
from teacher_cache.storage.local_store import LocalStore
from tests.support.builders import build, make_shards, published
from tests.support.strategies import make_plan

LEFTOVERS = (
    ".SEALED.json.0123456789abcdef.tmp",
    "commits/.00001.json.0123456789abcdef.tmp",
    "shards/.00000.arrow.0123456789abcdef.tmp",
    "shards/00002-0123456789abcdef.arrow",
)
STRANGERS = ("notes.txt", ".nfs0001", "shards/.DS_Store", "shards/mine.arrow", "commits/a.json")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A sealed cache with leftovers that are two days old, and files of other people."""
    build(tmp_path, make_shards())
    for name in (*LEFTOVERS, *STRANGERS):
        (tmp_path / name).write_bytes(b"left")
        past = time.time() - 2 * 86_400
        os.utime(tmp_path / name, (past, past))
    return tmp_path


def names(cache: Path) -> set[str]:
    return {str(file.relative_to(cache)) for file in cache.rglob("*") if file.is_file()}


def test_old_leftovers_are_removed_and_nothing_else(cache: Path) -> None:
    before = names(cache)
    report = collect_garbage(cache)
    assert {leftover.file for leftover in report.removed} == set(LEFTOVERS)
    assert (report.num_bytes, report.kept) == (16, ())
    assert names(cache) == before - set(LEFTOVERS)
    assert verify_cache(cache).problems == ()
    assert collect_garbage(cache).removed == ()


def test_young_leftovers_stay(cache: Path) -> None:
    before = names(cache)
    report = collect_garbage(cache, grace_hours=72.0)
    assert {leftover.file for leftover in report.kept} == set(LEFTOVERS)
    ahead = time.time() + 86_400  # by the clock of another machine
    os.utime(cache / LEFTOVERS[0], (ahead, ahead))
    assert len(collect_garbage(cache, dry_run=True).removed) == len(LEFTOVERS) - 1
    assert names(cache) == before


def test_a_cache_without_a_seal_is_refused(tmp_path: Path) -> None:
    write_plan(LocalStore(tmp_path), make_plan(make_shards()))
    (tmp_path / LEFTOVERS[0]).touch()
    with pytest.raises(IncompleteCacheError, match="0 of 3 shards"):
        collect_garbage(tmp_path, grace_hours=0.0)
    assert (tmp_path / LEFTOVERS[0]).exists()


def test_the_command_lists_what_it_would_remove(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = published(cache)
    assert main(["gc", str(cache), "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (len(report["removed"]), report["num_bytes"], report["kept"]) == (4, 16, [])
    assert main(["gc", str(cache), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"{LEFTOVERS[-1]}: 4 bytes would be removed" in said
    assert published(cache) == before
    assert main(["gc", str(cache / "nowhere")]) == 2


@pytest.mark.parametrize("hours", [-1.0, float("nan")])
def test_a_grace_period_that_would_spare_nothing_is_refused(cache: Path, hours: float) -> None:
    with pytest.raises(ValueError, match="grace_hours must be >= 0"):
        collect_garbage(cache, hours)
    assert set(LEFTOVERS) <= names(cache)
