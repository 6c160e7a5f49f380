"""The demo reads its results and its progress from the folders of its stages alone."""

import json
from pathlib import Path

import pytest

from pipeline.config.stages import TrainConfig
from pipeline.demo import recipes as demo_recipes
from student_train.config.objective import ObjectiveName
from teacher_cache.folder.layout import read_seal
from teacher_cache.storage.open_store import open_store
from tests.support.lazy import emkd_demo
from tests.support.run_fakes import CACHE, fake_cache, fake_evaluation, fake_run, write_json


def _student(out: Path, objective: ObjectiveName, seed: int) -> TrainConfig:
    return demo_recipes.demo_student(
        cache=out / "cache",
        teacher=out / "teacher" / "final",
        out=out / "runs" / f"{objective}-{seed}",
        objective=objective,
        seed=seed,
    )


def test_results_hold_one_line_for_each_finished_run_in_the_order_given(tmp_path: Path) -> None:
    configs = [_student(tmp_path, "emkd", 1), _student(tmp_path, "supervised", 0)]
    for config, right in zip(configs, ([True, False], [False, False]), strict=True):
        run = fake_run(config.out, config.training.objective.name, config.training.seed)
        fake_evaluation(run, right)
    fake_evaluation(tmp_path / "runs" / "teacher", [True, True])
    write_json(tmp_path / "teacher" / "seconds.json", 12.5)
    seal = read_seal(open_store(fake_cache(tmp_path / "cache")))
    assert seal is not None
    shown = emkd_demo.results(tmp_path, seal, configs)
    assert json.loads(json.dumps(shown)) == shown
    assert shown["teacher"] == {"accuracy": 1.0, "num_samples": 2, "seconds": 12.5}
    assert shown["cache"] == {
        "samples": 1280,
        "shards": 1,
        "bytes": 5_600_000,
        "fingerprint": CACHE,
        "seconds": 31.0,
    }
    same = {"num_samples": 2, "steps": 40, "seconds": 21.5}
    assert shown["runs"] == [
        {"objective": "emkd", "seed": 1, "accuracy": 0.5, **same},
        {"objective": "supervised", "seed": 0, "accuracy": 0.0, **same},
    ]


def test_results_of_a_run_that_was_not_evaluated_are_not_made_up(tmp_path: Path) -> None:
    config = _student(tmp_path, "rld", 0)
    fake_evaluation(tmp_path / "runs" / "teacher", [True])
    write_json(tmp_path / "teacher" / "seconds.json", 1.0)
    seal = read_seal(open_store(fake_cache(tmp_path / "cache")))
    assert seal is not None
    fake_run(config.out, "rld", 0)
    with pytest.raises(FileNotFoundError, match=r"rld-0/eval/metrics\.json"):
        emkd_demo.results(tmp_path, seal, [config])
