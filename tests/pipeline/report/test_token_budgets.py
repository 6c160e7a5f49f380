"""Accuracy against vision tokens kept: points, curves and differences at each budget."""

import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.stages import ReportConfig
from pipeline.report.comparison import compare, compare_progressions, group_runs
from pipeline.report.run_folders import collect
from student_train.config.compression import CompressionSettings
from student_train.config.objective import ObjectiveName
from student_train.config.progression import ProgressionConfig
from tests.support.lazy import Budget, budgets_of, draw_budgets, figures, write_report
from tests.support.run_fakes import fake_cache, fake_evaluation, fake_run, write_json

NUM = 40
TCD = ProgressionConfig(layer=1)
FIXED = ProgressionConfig(layer=1, preset="fixed", ratio=0.75)
ARMS: dict[str, tuple[ObjectiveName, ProgressionConfig]] = {
    "tcd": ("epic-tcd", TCD),
    "bare": ("supervised", TCD),
    "fixed": ("epic-tcd", FIXED),
    "bare-fixed": ("supervised", FIXED),
}
LABELS = (
    "vanilla",
    "supervised, fixed 0.75",
    "supervised, tcd",
    "epic-tcd",
    "epic-tcd, fixed 0.75",
)
BUDGETS = (("dart", 0.5, 22.0), ("dart", 0.9, 4.0), ("random", 0.5, 18.0))


def settings(compressor: str, ratio: float) -> CompressionSettings:
    return CompressionSettings.at_layer(1, ratio, compressor)


def right(name: str, seed: int, kept: float) -> list[bool]:
    """Answers that are drawn anew for every run and budget."""
    share = {"vanilla": 0.5, "tcd": 0.8, "bare": 0.4, "fixed": 0.6, "bare-fixed": 0.3}[name]
    draws = np.random.default_rng([seed, round(kept), *name.encode()])
    return (draws.random(NUM) < share).tolist()


def evaluate(folder: Path, name: str, seed: int) -> Path:
    fake_evaluation(folder, right(name, seed, 36), kept=36.0)
    for compressor, ratio, kept in BUDGETS:
        chosen = settings(compressor, ratio)
        answers = right(name, seed, kept)
        place = f"eval-{compressor}-{ratio:g}"
        fake_evaluation(folder, answers, name=place, compression=chosen, kept=kept)
    return folder


def study(root: Path) -> list[Path]:
    """The vanilla model, and two seeds of four ways to train it on."""
    cache = fake_cache(root / "cache")
    folders = [evaluate(root / "vanilla", "vanilla", 0)]
    for name, (objective, progression) in ARMS.items():
        for seed in (0, 1):
            place = root / f"{name}-{seed}"
            run = fake_run(place, objective, seed, cache=cache, progression=progression)
            folders.append(evaluate(run, name, seed))
    return folders


def test_a_point_is_the_mean_over_seeds_at_one_setting(tmp_path: Path) -> None:
    found = collect(study(tmp_path))
    assert found.missing == ()
    budgets = budgets_of(group_runs(found.runs))
    assert budgets is not None
    assert set(budgets.labels) == set(LABELS)
    words = [panel for panel in budgets.panels if panel.score == "word_accuracy"]
    assert [panel.title for panel in words] == ["dart at layer 1", "random at layer 1"]
    dart = words[0].rows
    assert [(row.num_kept, row.dropped) for row in dart] == [
        (36.0, "nothing"),
        (22.0, "50 %"),
        (4.0, "90 %"),
    ]
    for row in dart:
        expected = [statistics.fmean(right("tcd", seed, row.num_kept)) for seed in (0, 1)]
        assert row.scores["epic-tcd"] == Budget(num_kept=row.num_kept, scores=tuple(expected))
        assert len(row.scores["vanilla"].scores) == 1


def test_differences_at_a_budget_are_paired_there(tmp_path: Path) -> None:
    budgets = budgets_of(group_runs(collect(study(tmp_path)).runs))
    assert budgets is not None
    assert set(budgets.pairs) == {
        ("epic-tcd", "supervised, tcd"),
        ("epic-tcd", "epic-tcd, fixed 0.75"),
        ("epic-tcd, fixed 0.75", "supervised, fixed 0.75"),
        ("supervised, tcd", "supervised, fixed 0.75"),
    }
    row = next(row for row in budgets.panels[0].rows if row.num_kept == 4)
    for pair, ours, theirs in (
        (("epic-tcd", "supervised, tcd"), "tcd", "bare"),
        (("epic-tcd", "epic-tcd, fixed 0.75"), "tcd", "fixed"),
    ):
        for seed, value in row.differences[pair].by_seed:
            total = 0
            for mine, other in zip(right(ours, seed, 4), right(theirs, seed, 4), strict=True):
                total += mine - other
            assert value == pytest.approx(total / NUM)


def test_the_page_shows_the_curves_and_every_budget(tmp_path: Path) -> None:
    folders, out = study(tmp_path), tmp_path / "page.html"
    assert write_report(ReportConfig(runs=tuple(folders), out=out)) == []
    text = out.read_text()
    assert "Accuracy against vision tokens kept" in text
    assert "dart at layer 1: word accuracy" in text
    assert "epic-tcd minus supervised, tcd" in text
    assert "tcd, paper notes: dart at layer 1" in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    write_report(ReportConfig(runs=tuple(folders), out=tmp_path / "again.html"))
    assert (tmp_path / "again.html").read_text() == text


def test_runs_without_such_evaluations_have_no_such_section(tmp_path: Path) -> None:
    runs = [
        fake_evaluation(fake_run(tmp_path / name, name, 0), right("tcd", 0, 36), pictures=True)
        for name in ("supervised", "rld")
    ]
    other = fake_evaluation(runs[0], right("bare", 0, 36), name="eval-other", digest="e")
    assert other == runs[0]
    found = collect(runs)
    assert all(run.compressed == () for run in found.runs)
    assert budgets_of(group_runs(found.runs)) is None
    write_report(ReportConfig(runs=tuple(runs), out=tmp_path / "page.html"))
    assert "vision tokens kept" not in (tmp_path / "page.html").read_text()


def test_evaluations_that_cannot_be_shown_are_named(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a", "supervised", 0, progression=TCD)
    chosen, answers = settings("dart", 0.5), right("tcd", 0, 36)
    fake_evaluation(run, answers, kept=36.0)
    for name, digest in (("eval-dart", "d"), ("eval-other", "e"), ("eval-twice", "d")):
        fake_evaluation(run, answers, name=name, digest=digest, compression=chosen, kept=22.0)
    (run / "eval-killed").mkdir()
    stray = fake_evaluation(run, answers, name="eval-1", compression=chosen, kept=22.0) / "eval-1"
    metrics = json.loads((stray / "metrics.json").read_text())
    write_json(stray / "metrics.json", {**metrics, "weights": "of another model"})
    found = collect([run])
    assert [e.compression for e in found.runs[0].compressed] == [chosen]
    said = "\n".join(found.missing)
    assert f"{run / 'eval-other'}: is left out; its samples are not those" in said
    assert f"{run / 'eval-twice'}: is left out; another folder" in said
    assert f"{run / 'eval-killed'}: metrics.json is missing" in said
    assert f"{stray}: is left out; its model is not that of" in said


def test_a_cached_teacher_is_named_a_variant_wherever_a_run_is(tmp_path: Path) -> None:
    for name in ("epic-tcd", "epic-cached-tcd"):
        fake_run(tmp_path / name, name, 0, progression=ProgressionConfig())
    groups = group_runs(collect([tmp_path / "epic-tcd", tmp_path / "epic-cached-tcd"]).runs)
    assert {group.label for group in groups} == {"epic-tcd", "epic-cached-tcd (a variant)"}


def test_progressions_are_compared_where_all_else_is_equal(tmp_path: Path) -> None:
    groups = group_runs(collect(study(tmp_path)).runs)
    found = {(d.label, d.baseline) for d in compare_progressions(groups)}
    assert found == {
        ("epic-tcd", "epic-tcd, fixed 0.75"),
        ("supervised, tcd", "supervised, fixed 0.75"),
    }
    objectives, missing = compare(groups)
    assert missing == []
    assert {(d.label, d.baseline) for d in objectives} == {
        ("epic-tcd", "supervised, tcd"),
        ("epic-tcd, fixed 0.75", "supervised, fixed 0.75"),
    }


def test_the_same_budgets_are_drawn_with_the_same_bytes() -> None:
    budgets = [Budget(num_kept=36.0, scores=(0.9, 0.8)), Budget(num_kept=4.0, scores=(0.2, 0.3))]
    panels = {"dart": {"a": budgets}, "random": {"a": budgets[:1]}}
    first = draw_budgets("budgets", panels, {"a": figures.COLOURS[0]})
    assert first == draw_budgets("budgets", panels, {"a": figures.COLOURS[0]})
    assert first.startswith("<svg")
    assert figures.COLOURS[0] in first
