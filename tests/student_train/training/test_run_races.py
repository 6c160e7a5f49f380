"""Two processes on one folder leave the run of one: each step once, equal bits."""

import os
import random
import time
from pathlib import Path

import pytest

from student_train.training.checkpoint import finished_run, require_intact
from teacher_cache.folder.reader import CacheReader
from tests.support.children import finish, start
from tests.support.runs import SETTINGS, assert_same_run, lines, on_one_thread, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("delay", [0.0, 0.5, 1.5])
def test_two_trainings_of_one_run_at_once(
    delay: float, undisturbed: Path, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    """As after a double click, or where a worker that was given up for dead lives on."""
    run = tmp_path / "run"
    work = (on_one_thread, train, run, reader, vanilla, SETTINGS)
    first = start(*work)
    time.sleep(delay * random.Random(os.getpid()).random())
    codes = finish(first, start(*work))
    assert 0 in codes, "one of them ends"
    assert finished_run(run) is not None
    require_intact(run / "final")
    assert_same_run(run, undisturbed)
    assert [line["step"] for line in lines(run)] == [2, 4, 6, 7]
    left = {path.name for path in run.iterdir()}
    assert not [name for name in left if name.startswith(".attempt-") or name.endswith(".tmp")]
    train(run, reader, vanilla)  # a third finds it finished
    assert_same_run(run, undisturbed)
