"""`emkd demo`: runs every stage in miniature, on real handwriting, on a laptop.

Trains a vanilla teacher on grids of handwritten digits, runs it once over them (Ray), trains
students from the cache alone (supervised, + RLD, EM-KD; several seeds, two at a time), evaluates
them on unseen handwriting, and reports. Killed anywhere and run again, the demo ends with the same
numbers. The table shows the results, also where EM-KD does not win.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.demo.stages import (
    FULL,
    DemoSizes,
    cache_result,
    prepare_teacher,
    run_result,
    run_stages,
    teacher_result,
    write_results,
)
from pipeline.config.stages import TrainConfig
from pipeline.demo import recipes as demo_recipes
from student_train.config.objective import ObjectiveName
from student_train.training.checkpoint import FINAL_FOLDER
from teacher_cache.schema.manifest import Seal

OBJECTIVES: tuple[ObjectiveName, ...] = ("supervised", "rld", "emkd")
NUM_PICTURES = 4


def run_demo(out: Path, seeds: Sequence[int], sizes: DemoSizes = FULL) -> Path:
    """Run what is missing of the demo under `out`; returns the report's path."""
    out = out.absolute()
    data, pictures = out / "data", out / "cache-pictures"
    teacher = prepare_teacher(out, "cells", sizes, sizes.teacher)
    students = [
        sizes.resized(
            demo_recipes.demo_student(
                cache=out / "cache",
                teacher=teacher,
                out=out / "runs" / f"{objective}-{seed}",
                objective=objective,
                seed=seed,
            )
        )
        for objective in OBJECTIVES
        for seed in seeds
    ]
    models = {out / "runs" / "teacher": teacher}
    models.update({config.out: config.out / FINAL_FOLDER for config in students})
    evaluations = [
        demo_recipes.demo_evaluation(
            model=model,
            source=data / "heldout.json",
            out=run / "eval",
            cache=None if run.name == "teacher" else pictures,
        )
        for run, model in models.items()
    ]
    caches = [
        demo_recipes.demo_cache(  # of a few held-out samples, to draw their matchings
            source=data / "heldout.json", teacher=teacher, out=pictures, limit=NUM_PICTURES
        ),
        demo_recipes.demo_cache(source=data / "train.json", teacher=teacher, out=out / "cache"),
    ]
    seal = run_stages(caches, students, evaluations, sizes)
    return write_results(out, results(out, seal, students), tuple(models))


def results(out: Path, seal: Seal, students: Sequence[TrainConfig]) -> dict[str, Any]:
    """The content of results.json, read from the folders of the finished stages."""
    return {
        "teacher": teacher_result(out, out / "runs" / "teacher"),
        "cache": cache_result(seal),
        "runs": [run_result(config) for config in students],
    }
