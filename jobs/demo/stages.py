"""Runs the stages that both demos share, and collects their results.

Each stage is the function that its own command runs. Its results and progress are read from its
files only, so a demo that was killed anywhere resumes.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from transformers.utils.logging import disable_progress_bar

from jobs.cluster.actor_pool import get, ray_session
from jobs.cluster.options import RayOptions
from jobs.cluster.paths import absolute
from jobs.cluster.progress import ProgressBars
from jobs.stages.build import run_build
from pipeline.build.build import finished
from pipeline.config.build import BuildConfig
from pipeline.config.stages import EvaluateConfig, ReportConfig, TrainConfig
from pipeline.demo.config import DigitQuestions, DigitsConfig
from pipeline.demo.digits import write_digits
from pipeline.demo.teacher import TeacherSettings, train_demo_teacher
from pipeline.report.report import write_report
from pipeline.student.evaluate import METRICS_FILE, PREDICTIONS_FILE, evaluate
from pipeline.student.train import train
from student_train.training.checkpoint import finished_run
from student_train.training.metrics_log import logged_step
from teacher_cache.schema.manifest import Seal
from teacher_cache.storage.durable_files import write_atomic


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSizes:
    """The sizes of a demo; None keeps a recipe's value."""

    num_train: int = 4096
    num_heldout: int = 512
    teacher: TeacherSettings = TeacherSettings()
    student_steps: int | None = None
    save_steps: int | None = None
    grad_norm_steps: int | None = None

    def resized(self, config: TrainConfig) -> TrainConfig:
        """The student's settings at these sizes."""
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
"""Enough to see that every stage runs; the resulting numbers mean nothing."""


def prepare_teacher(
    out: Path, questions: DigitQuestions, sizes: DemoSizes, settings: TeacherSettings
) -> Path:
    """Write `out`/data and train the vanilla model in `out`/teacher, unless done; its folder."""
    disable_progress_bar()  # of transformers, which draws one for each loaded model
    data, folder = out / "data", out / "teacher"
    digits = DigitsConfig(
        out=data, questions=questions, num_train=sizes.num_train, num_heldout=sizes.num_heldout
    )
    with ProgressBars() as bars:
        write_digits(digits, bars.update)
        started = time.monotonic()
        final = train_demo_teacher(data, folder, settings, bars.update)
        seconds = folder / "seconds.json"
        if not seconds.exists():  # else an earlier run of the demo trained it
            write_atomic(seconds, f"{time.monotonic() - started:.1f}\n".encode())
    return final


def run_stages(
    caches: Sequence[BuildConfig],
    students: Sequence[TrainConfig],
    evaluations: Sequence[EvaluateConfig],
    sizes: DemoSizes,
) -> Seal:
    """Build, train and evaluate what is missing; returns the seal of the last cache.

    Students and evaluations run as many at a time as there are CPUs.
    """
    students = [config for config in students if finished_run(config.out) is None]
    evaluations = [each for each in evaluations if not (each.out / METRICS_FILE).exists()]
    built = all(finished(absolute(config)) is not None for config in caches)
    num_steps = sum(config.training.max_steps or 0 for config in students)
    num_answers = sizes.num_heldout * len(evaluations)
    # One session for all stages; none if nothing is left to do.
    with nullcontext() if built and not students and not evaluations else ray_session():
        workers = RayOptions(num_workers=min(2, os.cpu_count() or 1))
        seals = [run_build(config, workers) for config in caches]
        _run("students", train, students, logged_step, num_steps)
        _run("evaluate", evaluate, evaluations, _num_answers, num_answers)
    return seals[-1]


def write_results(out: Path, results: dict[str, Any], runs: tuple[Path, ...]) -> Path:
    """Write results.json and the report under `out`; returns the report's path."""
    write_atomic(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    page = out / "report.html"
    missing = write_report(ReportConfig(runs=runs, out=page))
    if missing:
        raise ValueError(f"{out}: the report lacks {', '.join(missing)}; remove the folder")
    return page


def teacher_result(out: Path, run: Path) -> dict[str, Any]:
    """The teacher in results.json: its score, and how long it was trained."""
    return {
        **scored(run / "eval"),
        "seconds": json.loads((out / "teacher" / "seconds.json").read_text()),
    }


def cache_result(seal: Seal) -> dict[str, Any]:
    """The cache in results.json."""
    return {
        "samples": seal.num_samples,
        "shards": len(seal.shards),
        "bytes": seal.num_bytes,
        "fingerprint": seal.fingerprint,
        "seconds": round(sum(shard.seconds for shard in seal.shards), 1),
    }


def run_result(config: TrainConfig) -> dict[str, Any]:
    """A trained student in results.json."""
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
    return {"accuracy": metrics["scores"]["word_accuracy"], "num_samples": metrics["num_samples"]}


def _run(
    what: str,
    stage: Callable[[Any], Any],
    configs: Sequence[Any],
    count_done: Callable[[Path], int],
    total: int,
) -> None:
    """Run a stage for each config as Ray tasks of one CPU; progress is read from their folders."""
    if not configs:
        return
    task = ray.remote(stage).options(num_cpus=1, max_retries=2)
    running = [task.remote(absolute(config)) for config in configs]
    with ProgressBars() as bars:
        while running:
            ready, running = ray.wait(running, timeout=1.0)
            for reference in ready:
                get(reference)
            done = sum(count_done(config.out) for config in configs)
            bars.update(what, total if not running else min(done, total - 1), total)


def _num_answers(evaluation: Path) -> int:
    file = evaluation / PREDICTIONS_FILE
    return len(file.read_text().splitlines()) if file.exists() else 0
