"""`emkd demo`: every stage in miniature, on real handwriting, on a laptop.

Trains a vanilla teacher on grids of handwritten digits, runs it once over them (Ray), trains
students from the cache alone (supervised, + RLD, EM-KD; several seeds, two at a time), evaluates
them on handwriting that was never trained on, and reports. Every stage is the function that
its own command runs and resumes by itself: killed anywhere and run again, the demo ends with the
same numbers. The table says what came out, also where EM-KD does not win.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from transformers.utils.logging import disable_progress_bar

from jobs.build_cache import run_build
from jobs.options import RayOptions
from jobs.paths import absolute
from jobs.progress import Bars
from jobs.ray_pool import get, ray_session
from pipeline import recipes
from pipeline.build import finished
from pipeline.config import DigitsConfig, EvaluateConfig, ReportConfig, TrainConfig
from pipeline.demo_teacher import TeacherSettings, train_demo_teacher
from pipeline.digits import write_digits
from pipeline.evaluate import METRICS_FILE, PREDICTIONS_FILE, evaluate
from pipeline.report import write_report
from pipeline.train import train
from student_train.checkpoint import FINAL_FOLDER, finished_run
from student_train.objective import ObjectiveName
from student_train.run_log import logged_step
from teacher_cache.manifest import Seal
from teacher_cache.storage import write_atomic


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSizes:
    """How much of everything the demo does; None leaves what the recipes say."""

    num_train: int = 4096
    num_heldout: int = 512
    teacher: TeacherSettings = TeacherSettings()
    student_steps: int | None = None
    save_steps: int | None = None
    grad_norm_steps: int | None = None


SMOKE = DemoSizes(
    num_train=128,
    num_heldout=16,
    teacher=TeacherSettings(vision_steps=4, language_steps=8),
    student_steps=8,
    save_steps=2,
    grad_norm_steps=4,
)
"""Enough to see that every stage runs; the numbers that come out mean nothing."""

OBJECTIVES: tuple[ObjectiveName, ...] = ("supervised", "rld", "emkd")
NUM_PICTURES = 4


def run_demo(out: Path, seeds: Sequence[int], sizes: DemoSizes = DemoSizes()) -> Path:
    """Run what is missing of the demo under `out`; returns the report's path."""
    disable_progress_bar()  # of transformers: it draws one for each model that is loaded
    out = out.absolute()
    data, teacher = out / "data", out / "teacher"
    with Bars() as bars:
        digits = DigitsConfig(out=data, num_train=sizes.num_train, num_heldout=sizes.num_heldout)
        write_digits(digits, partial(bars.update, "data"))
        started = time.monotonic()
        train_demo_teacher(data, teacher, sizes.teacher, partial(bars.update, "teacher"))
        _remember_seconds(teacher / "seconds.json", time.monotonic() - started)
    configs = {
        (objective, seed): _resized(
            recipes.demo_student(
                cache=out / "cache",
                teacher=teacher / FINAL_FOLDER,
                out=out / "runs" / f"{objective}-{seed}",
                objective=objective,
                seed=seed,
            ),
            sizes,
        )
        for objective in OBJECTIVES
        for seed in seeds
    }
    models = {out / "runs" / "teacher": teacher / FINAL_FOLDER}
    models.update({config.out: config.out / FINAL_FOLDER for config in configs.values()})
    evaluations = [
        recipes.demo_evaluation(
            model=model,
            source=data / "heldout.json",
            out=run / "eval",
            cache=None if run.name == "teacher" else out / "cache-pictures",
        )
        for run, model in models.items()
    ]
    caches = [
        recipes.demo_cache(
            source=data / "heldout.json",
            teacher=teacher / FINAL_FOLDER,
            out=out / "cache-pictures",  # a few held-out samples, to draw matchings of
            limit=NUM_PICTURES,
        ),
        recipes.demo_cache(
            source=data / "train.json", teacher=teacher / FINAL_FOLDER, out=out / "cache"
        ),
    ]
    untrained = [config for config in configs.values() if finished_run(config.out) is None]
    unscored = [config for config in evaluations if not (config.out / METRICS_FILE).exists()]
    built = all(finished(absolute(config)) is not None for config in caches)
    # one session for all stages, none where nothing is left to do
    with nullcontext() if built and not untrained and not unscored else ray_session():
        workers = RayOptions(num_workers=min(2, os.cpu_count() or 1))
        seal = [run_build(config, workers) for config in caches][-1]
        _train(untrained)
        _evaluate(unscored, sizes.num_heldout)
    text = json.dumps(results(out, seal, list(configs.values())), indent=1) + "\n"
    write_atomic(out / "results.json", text.encode())
    page = out / "report.html"
    missing = write_report(ReportConfig(runs=tuple(models), out=page))
    if missing:
        raise ValueError(f"{out}: the report lacks {', '.join(missing)}; remove the folder")
    return page


def results(out: Path, seal: Seal, configs: Sequence[TrainConfig]) -> dict[str, Any]:
    """What results.json holds, read from the folders of stages that have all finished."""
    return {
        "teacher": {
            **_scored(out / "runs" / "teacher"),
            "seconds": json.loads((out / "teacher" / "seconds.json").read_text()),
        },
        "cache": {
            "samples": seal.num_samples,
            "shards": len(seal.shards),
            "bytes": seal.num_bytes,
            "fingerprint": seal.fingerprint,
            "seconds": round(sum(shard.seconds for shard in seal.shards), 1),
        },
        "runs": [_result(config) for config in configs],
    }


def _resized(config: TrainConfig, sizes: DemoSizes) -> TrainConfig:
    return dataclasses.replace(
        config,
        max_steps=sizes.student_steps or config.max_steps,
        save_steps=sizes.save_steps or config.save_steps,
        grad_norm_steps=sizes.grad_norm_steps or config.grad_norm_steps,
    )


def _train(configs: Sequence[TrainConfig]) -> None:
    total = sum(config.max_steps or 0 for config in configs)
    _run("students", train, configs, lambda: (sum(logged_step(c.out) for c in configs), total))


def _evaluate(configs: Sequence[EvaluateConfig], num_samples: int) -> None:
    total = num_samples * len(configs)
    _run("evaluate", evaluate, configs, lambda: (sum(_answers(c.out) for c in configs), total))


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


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _answers(evaluation: Path) -> int:
    return len(_lines(evaluation / PREDICTIONS_FILE))


def _scored(run: Path) -> dict[str, Any]:
    metrics = json.loads((run / "eval" / METRICS_FILE).read_text())
    return {
        "accuracy": metrics["scores"]["word_accuracy"],
        "num_samples": metrics["num_samples"],
    }


def _result(config: TrainConfig) -> dict[str, Any]:
    record = finished_run(config.out)
    assert record is not None
    return {
        "objective": config.objective.name,
        "seed": config.seed,
        **_scored(config.out),
        "steps": record.identity.num_steps,
        "seconds": round(record.seconds, 1),
    }


def _remember_seconds(file: Path, seconds: float) -> None:
    """Write how long a stage took, unless an earlier run of the demo did."""
    if not file.exists():
        write_atomic(file, f"{seconds:.1f}\n".encode())
