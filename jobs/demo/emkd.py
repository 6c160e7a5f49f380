"""`emkd demo`: every stage in miniature, on real handwriting, on a laptop.

Trains a vanilla teacher on grids of handwritten digits, runs it once over them (Ray), trains
students from the cache alone (supervised, + RLD, EM-KD; several seeds, two at a time), evaluates
them on handwriting that was never trained on, and reports. Every stage is the function that
its own command runs and resumes by itself: killed anywhere and run again, the demo ends with the
same numbers. The table says what came out, also where EM-KD does not win.
"""

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from jobs.cluster.actor_pool import ray_session
from jobs.cluster.options import RayOptions
from jobs.cluster.paths import absolute
from jobs.demo.stages import (
    FULL,
    DemoSizes,
    cache_result,
    evaluate_models,
    make_teacher,
    run_result,
    teacher_result,
    train_students,
    unfinished,
    unscored,
)
from jobs.stages.build import run_build
from pipeline.build.build import finished
from pipeline.config.stages import ReportConfig, TrainConfig
from pipeline.demo import recipes as demo_recipes
from pipeline.demo.config import DigitsConfig
from pipeline.report.report import write_report
from student_train.config.objective import ObjectiveName
from student_train.training.checkpoint import FINAL_FOLDER
from teacher_cache.schema.manifest import Seal
from teacher_cache.storage.durable_files import write_atomic

OBJECTIVES: tuple[ObjectiveName, ...] = ("supervised", "rld", "emkd")
NUM_PICTURES = 4


def run_demo(out: Path, seeds: Sequence[int], sizes: DemoSizes = FULL) -> Path:
    """Run what is missing of the demo under `out`; returns the report's path."""
    disable_progress_bar()  # of transformers: it draws one for each model that is loaded
    out = out.absolute()
    data, teacher = out / "data", out / "teacher"
    digits = DigitsConfig(out=data, num_train=sizes.num_train, num_heldout=sizes.num_heldout)
    make_teacher(digits, teacher, sizes.teacher)
    configs = {
        (objective, seed): sizes.resized(
            demo_recipes.demo_student(
                cache=out / "cache",
                teacher=teacher / FINAL_FOLDER,
                out=out / "runs" / f"{objective}-{seed}",
                objective=objective,
                seed=seed,
            )
        )
        for objective in OBJECTIVES
        for seed in seeds
    }
    models = {out / "runs" / "teacher": teacher / FINAL_FOLDER}
    models.update({config.out: config.out / FINAL_FOLDER for config in configs.values()})
    evaluations = [
        demo_recipes.demo_evaluation(
            model=model,
            source=data / "heldout.json",
            out=run / "eval",
            cache=None if run.name == "teacher" else out / "cache-pictures",
        )
        for run, model in models.items()
    ]
    caches = [
        demo_recipes.demo_cache(
            source=data / "heldout.json",
            teacher=teacher / FINAL_FOLDER,
            out=out / "cache-pictures",  # a few held-out samples, to draw matchings of
            limit=NUM_PICTURES,
        ),
        demo_recipes.demo_cache(
            source=data / "train.json", teacher=teacher / FINAL_FOLDER, out=out / "cache"
        ),
    ]
    students, questions = unfinished(list(configs.values())), unscored(evaluations)
    built = all(finished(absolute(config)) is not None for config in caches)
    # one session for all stages, none where nothing is left to do
    with nullcontext() if built and not students and not questions else ray_session():
        workers = RayOptions(num_workers=min(2, os.cpu_count() or 1))
        seal = [run_build(config, workers) for config in caches][-1]
        train_students(students)
        evaluate_models(questions, sizes.num_heldout)
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
        "teacher": teacher_result(out, out / "runs" / "teacher"),
        "cache": cache_result(seal),
        "runs": [run_result(config) for config in configs],
    }
