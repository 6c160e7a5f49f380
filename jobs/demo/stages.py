"""What both demos share: their sizes, and stages as Ray tasks whose progress is read from files.

Promise: a stage is the function that its own command runs, resumes by itself, and is asked for
nothing that it has not written down, so that a demo killed anywhere goes on where it was.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from jobs.cluster.actor_pool import get
from jobs.cluster.paths import absolute
from jobs.cluster.progress import Bars
from pipeline.config.stages import EvaluateConfig, TrainConfig
from pipeline.demo.config import DigitsConfig
from pipeline.demo.digits import write_digits
from pipeline.demo.teacher import TeacherSettings, train_demo_teacher
from pipeline.student.evaluate import METRICS_FILE, PREDICTIONS_FILE, evaluate
from pipeline.student.train import train
from student_train.training.checkpoint import finished_run
from student_train.training.metrics_log import logged_step
from teacher_cache.schema.manifest import Seal
from teacher_cache.storage.durable_files import write_atomic


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSizes:
    """How much of everything a demo does; None leaves what the recipes say."""

    num_train: int = 4096
    num_heldout: int = 512
    teacher: TeacherSettings = TeacherSettings()
    student_steps: int | None = None
    save_steps: int | None = None
    grad_norm_steps: int | None = None

    def resized(self, config: TrainConfig) -> TrainConfig:
        """A student's settings at these sizes."""
        known = config.training
        return config.with_training(
            max_steps=self.student_steps or known.max_steps,
            save_steps=self.save_steps or known.save_steps,
            grad_norm_steps=self.grad_norm_steps or known.grad_norm_steps,
        )


FULL = DemoSizes()
SMOKE = DemoSizes(
    num_train=128,
    num_heldout=16,
    teacher=TeacherSettings(vision_steps=4, language_steps=8),
    student_steps=8,
    save_steps=2,
    grad_norm_steps=4,
)
"""Enough to see that every stage runs; the numbers that come out mean nothing."""


def make_teacher(digits: DigitsConfig, out: Path, settings: TeacherSettings) -> Path:
    """Write the data and train the vanilla model under `out`, what is missing of it."""
    with Bars() as bars:
        write_digits(digits, partial(bars.update, "data"))
        started = time.monotonic()
        final = train_demo_teacher(digits.out, out, settings, partial(bars.update, "teacher"))
        seconds = out / "seconds.json"
        if not seconds.exists():  # else an earlier run of the demo trained it
            write_atomic(seconds, f"{time.monotonic() - started:.1f}\n".encode())
    return final


def unfinished(configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """The students that are not trained yet."""
    return [config for config in configs if finished_run(config.out) is None]


def unscored(configs: Sequence[EvaluateConfig]) -> list[EvaluateConfig]:
    """The evaluations that have not ended."""
    return [config for config in configs if not (config.out / METRICS_FILE).exists()]


def train_students(configs: Sequence[TrainConfig]) -> None:
    """Train them, as many at a time as there are CPUs."""
    total = sum(config.training.max_steps or 0 for config in configs)
    _run("students", train, configs, lambda: (sum(logged_step(c.out) for c in configs), total))


def evaluate_models(configs: Sequence[EvaluateConfig], num_samples: int) -> None:
    """Evaluate them, as many at a time as there are CPUs."""
    total = num_samples * len(configs)
    _run("evaluate", evaluate, configs, lambda: (sum(_answers(c.out) for c in configs), total))


def teacher_result(out: Path, run: Path) -> dict[str, Any]:
    """What results.json says of the teacher: its score, and how long it was trained."""
    return {
        **scored(run / "eval"),
        "seconds": json.loads((out / "teacher" / "seconds.json").read_text()),
    }


def cache_result(seal: Seal) -> dict[str, Any]:
    """What results.json says of the cache."""
    return {
        "samples": seal.num_samples,
        "shards": len(seal.shards),
        "bytes": seal.num_bytes,
        "fingerprint": seal.fingerprint,
        "seconds": round(sum(shard.seconds for shard in seal.shards), 1),
    }


def run_result(config: TrainConfig) -> dict[str, Any]:
    """What results.json says of a trained student."""
    record = finished_run(config.out)
    assert record is not None
    return {
        "objective": config.training.objective.name,
        "seed": config.training.seed,
        **scored(config.out / "eval"),
        "steps": record.identity.num_steps,
        "seconds": round(record.seconds, 1),
    }


def scored(evaluation: Path) -> dict[str, Any]:
    """Accuracy and number of samples of a finished evaluation."""
    metrics = json.loads((evaluation / METRICS_FILE).read_text())
    return {
        "accuracy": metrics["scores"]["word_accuracy"],
        "num_samples": metrics["num_samples"],
    }


def _run(
    what: str,
    stage: Callable[[Any], Any],
    configs: Sequence[Any],
    progress: Callable[[], tuple[int, int]],
) -> None:
    """Run a stage for each config as Ray tasks of one CPU; progress is read from their files."""
    task = ray.remote(stage).options(num_cpus=1, max_retries=2)
    running = [task.remote(absolute(config)) for config in configs]
    with Bars() as bars:
        while running:
            ready, running = ray.wait(running, timeout=1.0)
            for reference in ready:
                get(reference)
            done, total = progress()
            bars.update(what, total if not running else min(done, total - 1), total)


def _answers(evaluation: Path) -> int:
    file = evaluation / PREDICTIONS_FILE
    return len(file.read_text().splitlines()) if file.exists() else 0
