"""EPIC in the trainer: what a run logs, that it resumes to the bit, what it refuses to begin."""

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from student_train.config.objective import ObjectiveName, preset
from student_train.config.progression import ProgressionConfig
from student_train.config.recipe import TrainerSettings
from student_train.epic.step_plan import plan_step
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.errors import CacheMismatchError
from tests.support.children import finish, kill_in_mid_run, start
from tests.support.epic import fixed, save_deep, train_vanilla
from tests.support.runs import (
    SETTINGS,
    assert_nearly_same_run,
    assert_same_run,
    interrupted,
    lines,
    on_one_thread,
    on_ranks,
    tiny_cache,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ICD = ProgressionConfig(schedule="icd", icd_layers=(3,), layer=1, compressor="random")


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_deep(tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module")
def reader(vanilla: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return tiny_cache(tmp_path_factory.mktemp("epic") / "cache", vanilla)


def epic(
    name: ObjectiveName = "epic-tcd", progression: ProgressionConfig | None = None
) -> TrainerSettings:
    schedule = preset(name).epic_schedule or "tcd"
    chosen = progression or ProgressionConfig(schedule=schedule)
    return replace(SETTINGS, objective=preset(name), progression=chosen, log_steps=1)


CASES = {"tcd, dart": epic(), "icd, random": epic("epic-icd", ICD)}


@pytest.fixture(scope="module", params=CASES)
def undisturbed(
    request: pytest.FixtureRequest,
    reader: CacheReader,
    vanilla: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, TrainerSettings]:
    run, settings = tmp_path_factory.mktemp("undisturbed") / "run", CASES[request.param]
    train_vanilla(run, reader, vanilla, settings)
    return run, settings


def test_the_log_is_the_schedule(undisturbed: tuple[Path, TrainerSettings]) -> None:
    run, settings = undisturbed
    assert settings.progression is not None
    logged = lines(run)
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6, 7]
    for line in logged:
        step = int(line["step"]) - 1
        plan = plan_step(settings.progression, seed=0, step=step, num_steps=7, num_layers=4)
        assert line["diagnostic/epic_layer"] == plan.difficulty.layer
        found = [line[f"diagnostic/{name}"] for name in ("student_ratio", "teacher_ratio")]
        assert found == pytest.approx(
            [plan.difficulty.student_ratio, plan.difficulty.teacher_ratio], rel=1e-6
        )
        assert 0 < line["diagnostic/vision_tokens_kept"] <= line["diagnostic/vision_tokens"]
        assert line["term/kd"] >= 0
        expected = 0.3 * line["term/supervised"] + 0.7 * line["term/kd"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert "gradient/kd" in logged[3]
    assert any(line["term/kd"] > 1e-6 for line in logged)


@pytest.mark.parametrize("step", [3, 6])
def test_resuming_mid_schedule_is_going_on_to_the_bit(
    undisturbed: tuple[Path, TrainerSettings],
    reader: CacheReader,
    vanilla: Path,
    tmp_path: Path,
    step: int,
) -> None:
    whole, settings = undisturbed
    run = interrupted(tmp_path / "run", whole, step)
    train_vanilla(run, reader, vanilla, settings)
    assert_same_run(run, whole)


def test_killed_at_any_moment_and_run_again_ends_with_the_same_bits(
    undisturbed: tuple[Path, TrainerSettings], reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    whole, settings = undisturbed
    run = tmp_path / "run"
    work = (on_one_thread, train_vanilla, run, reader, vanilla, settings)
    kill_in_mid_run(run / "metrics.jsonl", random.Random(os.getpid()).randint(1, 6), *work)
    assert finish(start(*work)) == [0]
    assert_same_run(run, whole)


def test_two_workers_drop_the_same_tokens_as_one(
    reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    """DistributedDataParallel; one sample a micro-batch, so that only the means differ."""
    settings = replace(epic(progression=fixed("random")), max_steps=3, micro_batch_size=1)
    train_vanilla(tmp_path / "one", reader, vanilla, settings)
    on_ranks(2, train_vanilla, tmp_path / "two", reader, vanilla, settings)
    names = ("loss", "term/kd", "diagnostic/vision_tokens_kept")
    assert_nearly_same_run(tmp_path / "two", tmp_path / "one", *names)


@pytest.mark.parametrize("objective", ["emkd", "supervised", "epic-lcd"])
def test_other_objectives_and_schedules_train_too(
    objective: ObjectiveName, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    settings = replace(epic(objective), max_steps=4, dtype="bfloat16", gradient_checkpointing=True)
    train_vanilla(tmp_path / "run", reader, vanilla, settings)
    logged = lines(tmp_path / "run")
    assert {n.removeprefix("term/") for n in logged[-1] if n.startswith("term/")} == {
        "emkd": {"supervised", "rld", "vsd", "vlad"},
        "supervised": {"supervised"},
        "epic-lcd": {"supervised", "kd"},
    }[objective]
    if objective == "epic-lcd":
        assert [line["diagnostic/epic_layer"] for line in logged] == [4, 4, 3, 3]
        assert logged[0]["term/kd"] == 0
        assert logged[-1]["term/kd"] > 0


def test_another_progression_is_another_run(
    undisturbed: tuple[Path, TrainerSettings], reader: CacheReader, vanilla: Path
) -> None:
    run, settings = undisturbed
    assert settings.progression is not None
    other = replace(settings, progression=replace(settings.progression, compressor="fastv"))
    with pytest.raises(CacheMismatchError, match=r"recipe\.progression\.compressor: stored"):
        train_vanilla(run, reader, vanilla, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (epic(progression=ProgressionConfig(layer=4)), "the decoder has 4 layers"),
        (epic("epic-icd"), r"\(3, 2, 1, 2\) in a decoder of 4 layers"),
        (epic(progression=fixed("squeeze")), "squeeze"),
    ],
)
def test_what_some_step_could_not_do_is_refused_before_the_first(
    settings: TrainerSettings, message: str, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train_vanilla(tmp_path / "run", reader, vanilla, settings)
    assert not (tmp_path / "run").exists()
