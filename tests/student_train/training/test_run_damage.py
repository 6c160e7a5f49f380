"""Every damage to a run's folder is named, or the run ends as if there had been none."""

import logging
import random
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from student_train.training.checkpoint import (
    CHECKPOINT_FILE,
    finished_run,
    newest_checkpoint,
    read_identity,
    require_intact,
)
from student_train.training.metrics_log import read_log
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.errors import DecodeError, EmkdError
from tests.support.runs import assert_same_run, interrupted, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")

Damage = tuple[str, bytes | None]


def _damages(data: bytes, draws: random.Random) -> Iterator[Damage]:
    """A flipped bit, a cut, bytes appended, an empty file, no file."""
    flipped = bytearray(data)
    flipped[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    yield "flip", bytes(flipped)
    yield "cut", data[: draws.randrange(len(data))]
    yield "more", data + b"x"
    yield "empty", b""
    yield "gone", None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _apply(path: Path, data: bytes | None) -> None:
    path.unlink() if data is None else path.write_bytes(data)


def test_whatever_is_damaged_in_a_checkpoint_the_spare_is_taken_and_the_file_named(
    undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draws, newest, num_damages = random.Random(1), "checkpoint-6", 0
    identity = read_identity(undisturbed)
    names = [path.relative_to(undisturbed / newest) for path in _files(undisturbed / newest)]
    assert {"optimizer.pt", "scheduler.pt", "model.safetensors"} < {str(name) for name in names}
    run = interrupted(tmp_path / "run", undisturbed, 6)
    for name in names:
        whole = (run / newest / name).read_bytes()
        for what, data in _damages(whole, draws):
            if (str(name), what) == (CHECKPOINT_FILE, "gone"):
                continue  # an incomplete checkpoint, as after a kill
            _apply(run / newest / name, data)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                found = newest_checkpoint(run, identity)
            assert found is not None
            assert found.folder.name == "checkpoint-3", (name, what)
            (said,) = caplog.messages
            assert str(name) in said, what
            assert "going on from checkpoint-3" in said
            num_damages += 1
        (run / newest / name).write_bytes(whole)
    assert num_damages >= 50
    found = newest_checkpoint(run, identity)
    assert found is not None
    assert found.folder.name == newest


def test_from_the_spare_a_run_ends_as_if_nothing_had_been_damaged(
    undisturbed: Path, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = interrupted(tmp_path / "run", undisturbed, 6)
    (run / "checkpoint-6" / "optimizer.pt").unlink()
    train(run, reader, vanilla)
    assert_same_run(run, undisturbed)


def test_without_an_intact_checkpoint_a_run_is_refused_and_the_remedy_helps(
    undisturbed: Path, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = interrupted(tmp_path / "run", undisturbed, 6)
    for step in (3, 6):
        (run / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(DecodeError, match=r"no checkpoint is intact: .*optimizer.pt is missing"):
        train(run, reader, vanilla)
    for step in (3, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    train(run, reader, vanilla)
    assert_same_run(run, undisturbed)


def test_every_damage_of_a_trained_student_is_named(undisturbed: Path, tmp_path: Path) -> None:
    draws, num_damages = random.Random(2), 0
    for path in _files(undisturbed / "final"):
        name = path.relative_to(undisturbed)
        for what, data in _damages(path.read_bytes(), draws):
            run = tmp_path / "run"
            shutil.copytree(undisturbed, run)
            _apply(run / name, data)
            num_damages += 1
            if (name.name, what) == ("emkd_run.json", "gone"):
                assert finished_run(run) is None, "the run counts as unfinished"
            elif (name.name, what) == ("emkd_run.json", "more"):
                with pytest.raises(EmkdError, match=name.name):
                    finished_run(run)
            else:
                with pytest.raises(EmkdError, match=name.name):
                    require_intact(run / "final")
            shutil.rmtree(run)
    assert num_damages >= 30
    require_intact(undisturbed / "final")


def test_damaged_lines_of_the_log_are_counted_and_left_out(
    undisturbed: Path,
    reader: CacheReader,
    vanilla: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    draws = random.Random(3)
    whole = read_log(undisturbed).lines
    data = (undisturbed / "metrics.jsonl").read_bytes()
    for _ in range(200):
        damaged = bytearray(data)
        damaged[draws.randrange(len(data) - 1)] ^= 1 << draws.randrange(8)
        (tmp_path / "metrics.jsonl").write_bytes(bytes(damaged))
        found = read_log(tmp_path)
        assert found.damaged
        assert all(line in whole for line in found.lines)
    run = interrupted(tmp_path / "run", undisturbed, 6)
    (run / "metrics.jsonl").write_bytes(data.replace(b'"loss"', b'"lost"', 1))
    with caplog.at_level(logging.WARNING):
        train(run, reader, vanilla)
    assert any("1 lines are damaged" in message for message in caplog.messages)
    assert [line["step"] for line in read_log(run).lines] == [4, 6, 7]
    assert finished_run(run) is not None
    for name, mine in weights(run / "final").items():
        assert torch.equal(mine, weights(undisturbed / "final")[name])


def test_published_files_may_be_read_by_whom_the_umask_lets(undisturbed: Path) -> None:
    probe = undisturbed / "probe"
    probe.touch()
    wanted = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in _files(undisturbed):
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
