"""The EPIC demo reads its results and its table from the folders of its stages alone."""

import json
from pathlib import Path

import pytest

from pipeline.demo import recipes as demo_recipes
from student_train.config.compression import CompressionSettings
from teacher_cache.folder.layout import read_seal
from teacher_cache.storage.open_store import open_store
from tests.support.lazy import epic_demo
from tests.support.run_fakes import fake_cache, fake_evaluation, fake_run, write_json


def _evaluated(run: Path, num_right: int) -> None:
    """All tokens, and every budget with one right answer less than the one before."""
    right = [True] * num_right + [False] * (10 - num_right)
    fake_evaluation(run, right, kept=36.0)
    for compressor in epic_demo.DEMO_COMPRESSORS:
        for number, ratio in enumerate(epic_demo.RATIOS, start=1):
            settings = CompressionSettings.at_layer(1, ratio, compressor)
            fake_evaluation(
                run,
                right[number:] + [False] * number,
                name=f"eval-{compressor}-{ratio:g}",
                compression=settings,
                kept=float(round(36 * (1 - ratio))),
            )


def test_results_hold_every_budget_of_every_run_and_the_table_their_means(tmp_path: Path) -> None:
    configs = {
        (arm, seed): demo_recipes.demo_epic_student(
            cache=tmp_path / "cache",
            teacher=tmp_path / "teacher" / "final",
            out=tmp_path / "runs" / f"{arm}-{seed}",
            objective=objective,
            progressive=progressive,
            seed=seed,
        )
        for arm, (objective, progressive) in epic_demo.ARMS.items()
        for seed in (0, 1)
    }
    for (arm, seed), config in configs.items():
        assert config.training.progression is not None
        run = fake_run(
            config.out,
            config.training.objective.name,
            seed,
            progression=config.training.progression,
        )
        _evaluated(run, 7 + seed if arm == "tcd" else 6)
    _evaluated(tmp_path / "runs" / "vanilla", 9)
    write_json(tmp_path / "teacher" / "seconds.json", 12.5)
    seal = read_seal(open_store(fake_cache(tmp_path / "cache")))
    assert seal is not None
    shown = epic_demo.epic_results(tmp_path, seal, configs)
    assert json.loads(json.dumps(shown)) == shown
    first = shown["runs"][0]
    assert (first["arm"], first["objective"], first["seed"]) == ("tcd", "epic-tcd", 0)
    assert [run["arm"] for run in shown["runs"][::2]] == list(epic_demo.ARMS)
    assert len(first["budgets"]) == len(epic_demo.DEMO_COMPRESSORS) * len(epic_demo.RATIOS)
    assert first["budgets"][1] == {
        "compressor": "dart",
        "ratio": 0.5,
        "kept": 18.0,
        "accuracy": pytest.approx(0.5),
    }
    write_json(tmp_path / "results.json", shown)
    table = [line.split() for line in epic_demo.lines(tmp_path)]
    assert table[0] == ["tokens", "kept", "vanilla", *epic_demo.ARMS]
    assert table[1] == ["all", "90.0", "75.0", "60.0", "60.0", "60.0"]
    assert table[2] == ["dart", "27", "80.0", "65.0", "50.0", "50.0", "50.0"]
    assert len(table) == 2 + len(epic_demo.DEMO_COMPRESSORS) * len(epic_demo.RATIOS)
