"""Promises of resuming: a SIGKILL costs time and nothing else; the number of workers is free."""

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from student_train.training.checkpoint import CHECKPOINT_FILE
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.errors import CacheMismatchError
from tests.support.children import finish, kill_in_mid_run, start
from tests.support.runs import (
    SETTINGS,
    assert_nearly_same_run,
    assert_same_run,
    interrupted,
    lines,
    on_one_thread,
    on_ranks,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_killed_at_any_moment_and_run_again_ends_with_the_same_bits(
    reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    every_step = replace(SETTINGS, log_steps=1)
    straight = tmp_path / "straight"
    train(straight, reader, vanilla, every_step)
    work = (on_one_thread, train, run, reader, vanilla, every_step)
    kill_in_mid_run(run / "metrics.jsonl", random.Random(os.getpid()).randint(1, 6), *work)
    assert finish(start(*work)) == [0]
    assert_same_run(run, straight)


def test_two_workers_compute_what_one_computes_and_one_goes_on_from_them(
    undisturbed: Path, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    on_ranks(2, train, run, reader, vanilla, SETTINGS)
    for _ in range(2):
        assert_nearly_same_run(run, undisturbed, "samples", "loss", rel=1e-4)
        shutil.rmtree(run / "final")
        train(run, reader, vanilla)


@pytest.mark.parametrize("step", [3, 6])
def test_resuming_continues_logging_windows_and_drops_lines_of_lost_steps(
    undisturbed: Path, reader: CacheReader, vanilla: Path, tmp_path: Path, step: int
) -> None:
    """As if killed after the last step and before `final/`, with a half-written checkpoint."""
    run = interrupted(tmp_path / "run", undisturbed, 6)
    (run / "checkpoint-6" / CHECKPOINT_FILE).unlink() if step == 3 else None
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 1.0, "seconds": 50')  # torn by the kill
    train(run, reader, vanilla)
    assert_same_run(run, undisturbed)
    assert lines(run)[-1]["seconds"] > lines(undisturbed)[-1]["seconds"]


def test_how_often_to_log_may_change_between_attempts(
    undisturbed: Path, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = interrupted(tmp_path / "run", undisturbed, 3)
    train(run, reader, vanilla, replace(SETTINGS, log_steps=1))
    assert [line["step"] for line in lines(run)] == [2, 4, 5, 6, 7]  # windows of 2 before step 3


def test_a_checkpoint_of_another_run_is_not_resumed_from(
    undisturbed: Path, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed / "checkpoint-6", run / "checkpoint-6")
    with pytest.raises(CacheMismatchError, match=r"wrote .*checkpoint-6[\s\S]*recipe.seed"):
        train(run, reader, vanilla, replace(SETTINGS, seed=3))
