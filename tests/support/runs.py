"""Short training runs on tiny models, and what a test asks of their folders."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from student_train.config.objective import ObjectiveConfig
from student_train.config.recipe import TrainerSettings
from student_train.data.batch_plan import BatchPlan
from student_train.data.stream import Encoder, TrainingStream
from student_train.training.checkpoint import FinishedRun
from student_train.training.metrics_log import read_log
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.options import RecordSettings, TierName
from teacher_cache.teacher.teacher import Teacher
from tests.support.caches import build_cache, student_loader
from tests.support.children import finish, start_ranks
from tests.support.lazy import train_student
from tests.support.tiny import tiny_samples

PAIRS = RecordSettings(records="topk+sketch", top_k=16, sketch_rank=8)
SETTINGS = TrainerSettings(
    max_steps=7,
    batch_size=4,
    micro_batch_size=2,
    learning_rate=1e-3,
    save_steps=3,
    log_steps=2,
    grad_norm_steps=4,
    device="cpu",
)


def tiny_cache(cache: Path, vanilla: Path, num_samples: int = 10) -> CacheReader:
    """A cache of the vanilla model's outputs, tier `topk+sketch`."""
    teacher = Teacher.load(str(vanilla), device="cpu", dtype="float32")
    return build_cache(cache, teacher, tiny_samples(num_samples), PAIRS)


def train(
    run: Path,
    reader: CacheReader,
    vanilla: Path,
    settings: TrainerSettings = SETTINGS,
    student: str = "tiny",
) -> FinishedRun:
    """Train a pooled student of the vanilla model in this process."""
    return train_student(run, reader, student_loader(vanilla), settings, student=student)


def on_one_thread(work: Callable[..., object], *arguments: object) -> None:
    """`work(*arguments)` for a child process, where nothing has set the number of threads yet."""
    torch.set_num_threads(1)
    work(*arguments)


def on_ranks(num_ranks: int, work: Callable[..., object], *arguments: object) -> None:
    """`work(*arguments)` on each rank of a process group of children, which all succeed."""
    ranks = start_ranks(num_ranks, on_one_thread, work, *arguments)
    assert finish(*ranks) == [0] * num_ranks


def stream_of(
    reader: CacheReader,
    encode: Encoder,
    *,
    objective: ObjectiveConfig | None = None,
    tier: TierName = "topk+sketch",
    seed: int = 0,
    num_threads: int = 0,
    **plan: int,
) -> TrainingStream:
    """A stream of steps of four samples, two at once, unless `plan` says otherwise."""
    return TrainingStream(
        reader,
        encode,
        objective=objective or ObjectiveConfig(),
        tier=tier,
        pad_token_id=0,
        seed=seed,
        plan=BatchPlan(**{"batch_size": 4, "micro_batch_size": 2, **plan}),
        num_threads=num_threads,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def lines(run: Path) -> list[dict[str, Any]]:
    found = read_log(run)
    assert not found.damaged
    return found.lines


def interrupted(run: Path, whole: Path, step: int) -> Path:
    """A copy of a run of 7 steps as after a kill before `final/`; `step` is its last checkpoint."""
    shutil.copytree(whole, run)
    shutil.rmtree(run / "final")
    if step == 3:
        shutil.rmtree(run / "checkpoint-6")
    return run


def assert_nearly_same_run(
    run: Path, other: Path, *names: str, rel: float = 1e-3, key_bias: float = 1e-5
) -> None:
    """Equal weights, and logged values of these names, to rounding.

    A key's bias has no gradient but rounding errors: it may have a tolerance of its own.
    """
    mine, theirs = weights(run / "final"), weights(other / "final")
    assert mine.keys() == theirs.keys()
    for name in mine:
        atol = key_bias if name.endswith("k_proj.bias") else 1e-5
        torch.testing.assert_close(mine[name], theirs[name], atol=atol, rtol=1e-4)
    for line, wanted in zip(lines(run), lines(other), strict=True):
        for name in names:
            assert line[name] == pytest.approx(wanted[name], rel=rel), name


def assert_same_run(run: Path, other: Path) -> None:
    """Equal final weights to the bit, and equal metrics, wall time apart."""
    mine, theirs = weights(run / "final"), weights(other / "final")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for line, wanted in zip(lines(run), lines(other), strict=True):
        assert {**line, "seconds": 0} == {**wanted, "seconds": 0}
