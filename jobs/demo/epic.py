"""`emkd demo --epic`: does a model learn to answer from fewer vision tokens, on real handwriting?

Trains a vanilla model that reads rows of handwritten digits, then continues in four ways: with
EPIC's token-wise progression or with one high ratio throughout, each with and without the
consistency loss; several seeds. All of them, and the vanilla model, are evaluated with DART, FastV
and Random at several budgets. Killed anywhere and run again, the demo ends with the same numbers.
The table shows the results, also where EPIC does not win.
"""

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.demo.stages import (
    FULL,
    DemoSizes,
    cache_result,
    prepare_teacher,
    run_result,
    run_stages,
    scored,
    teacher_result,
    write_results,
)
from pipeline.config.stages import EvaluateConfig, TrainConfig
from pipeline.demo import recipes as demo_recipes
from pipeline.student.evaluate import METRICS_FILE
from student_train.config.objective import ObjectiveName
from student_train.training.checkpoint import FINAL_FOLDER
from teacher_cache.schema.manifest import Seal

LANGUAGE_STEPS = 400
"""Of the teacher: looking up the row before reading it takes more steps than naming cells."""

ARMS: dict[str, tuple[ObjectiveName, bool]] = {
    "tcd": ("epic-tcd", True),
    "tcd-no-kd": ("supervised", True),
    "fixed": ("epic-tcd", False),
    "fixed-no-kd": ("supervised", False),
}
"""Name -> objective, and whether the ratio grows."""

DEMO_COMPRESSORS = ("dart", "fastv", "random")
RATIOS = (0.25, 0.5, 0.75, 0.9)
"""Of 36 tokens FastV and Random keep 27, 18, 9 and 3, DART 28, 22, 10 and 4."""


def run_demo_epic(out: Path, seeds: Sequence[int], sizes: DemoSizes = FULL) -> Path:
    """Run what is missing of the demo under `out`; returns the report's path."""
    out = out.absolute()
    data, settings = out / "data", sizes.teacher
    if sizes == FULL:
        settings = dataclasses.replace(settings, language_steps=LANGUAGE_STEPS)
    teacher = prepare_teacher(out, "rows", sizes, settings)
    students = {
        (arm, seed): sizes.resized(
            demo_recipes.demo_epic_student(
                cache=out / "cache",
                teacher=teacher,
                out=out / "runs" / f"{arm}-{seed}",
                objective=objective,
                progressive=progressive,
                seed=seed,
            )
        )
        for arm, (objective, progressive) in ARMS.items()
        for seed in seeds
    }
    models = {out / "runs" / "vanilla": teacher}
    models.update({config.out: config.out / FINAL_FOLDER for config in students.values()})
    evaluations = [
        evaluation
        for run, model in models.items()
        for evaluation in _evaluations(run, model, data / "heldout.json")
    ]
    cache = demo_recipes.demo_epic_cache(
        source=data / "train.json", teacher=teacher, out=out / "cache"
    )
    seal = run_stages([cache], list(students.values()), evaluations, sizes)
    return write_results(out, epic_results(out, seal, students), tuple(models))


def epic_results(
    out: Path, seal: Seal, students: Mapping[tuple[str, int], TrainConfig]
) -> dict[str, Any]:
    """The content of results.json, read from the folders of the finished stages."""
    vanilla = out / "runs" / "vanilla"
    return {
        "vanilla": {**teacher_result(out, vanilla), "budgets": list(_budgets(vanilla))},
        "cache": cache_result(seal),
        "runs": [
            {"arm": arm, **run_result(config), "budgets": list(_budgets(config.out))}
            for (arm, _), config in students.items()
        ],
    }


def lines(out: Path) -> list[str]:
    """The table of results.json: accuracy at each budget, in percent, mean over seeds."""
    found = json.loads((out / "results.json").read_text())
    columns: dict[str, list[Any]] = {"vanilla": [found["vanilla"]]}
    columns |= {arm: [run for run in found["runs"] if run["arm"] == arm] for arm in ARMS}
    table = [("tokens kept", list(columns))]
    budgets = [f"{b['compressor']} {b['kept']:g}" for b in found["vanilla"]["budgets"]]
    for number, name in enumerate(["all", *budgets]):
        means: list[str] = []
        for runs in columns.values():
            at = [[run, *run["budgets"]][number]["accuracy"] for run in runs]
            means.append(f"{100 * statistics.fmean(at):.1f}")
        table.append((name, means))
    return [f"{name:<12}" + "".join(f"{cell:>13}" for cell in cells) for name, cells in table]


def _evaluations(run: Path, model: Path, source: Path) -> Iterator[EvaluateConfig]:
    """All vision tokens, and every compressor at every ratio."""
    yield demo_recipes.demo_epic_evaluation(model=model, source=source, out=run / "eval")
    for compressor, ratio, out in _compressed(run):
        yield demo_recipes.demo_epic_evaluation(
            model=model, source=source, out=out, compressor=compressor, ratio=ratio
        )


def _compressed(run: Path) -> Iterator[tuple[str, float, Path]]:
    for compressor in DEMO_COMPRESSORS:
        for ratio in RATIOS:
            yield compressor, ratio, run / f"eval-{compressor}-{ratio:g}"


def _budgets(run: Path) -> Iterator[dict[str, Any]]:
    for compressor, ratio, folder in _compressed(run):
        metrics = json.loads((folder / METRICS_FILE).read_text())
        yield {
            "compressor": compressor,
            "ratio": ratio,
            "kept": metrics["vision_tokens"]["kept"],
            "accuracy": scored(folder)["accuracy"],
        }
