"""Short training runs on tiny models, and what a test asks of their folders."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from student_train.config.recipe import TrainerSettings
from student_train.training.checkpoint import FinishedRun
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.options import RecordSettings
from teacher_cache.teacher.teacher import Teacher
from tests.support.caches import build_cache, student_loader
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


def train_on_one_thread(
    run: Path, reader: CacheReader, vanilla: Path, settings: TrainerSettings
) -> None:
    """The same in a child process, where nothing has set the number of threads yet."""
    torch.set_num_threads(1)
    train(run, reader, vanilla, settings)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, other: Path) -> None:
    """Equal final weights to the bit, and equal metrics, wall time apart."""
    mine, theirs = weights(run / "final"), weights(other / "final")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for line, wanted in zip(lines(run), lines(other), strict=True):
        assert {**line, "seconds": 0} == {**wanted, "seconds": 0}
