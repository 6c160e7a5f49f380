"""Promises of a training run: what it leaves and logs, what it refuses, and no teacher."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.config.objective import ObjectiveConfig, preset
from student_train.losses.step_counts import StepCounts
from student_train.training.checkpoint import RunIdentity
from student_train.training.trainable import set_trainable
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.folder.reader import CacheReader
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.errors import CacheMismatchError
from teacher_cache.teacher.teacher import Teacher
from tests.support.caches import student_loader
from tests.support.lazy import (
    AutoModelForImageTextToText,
    AutoProcessor,
    student_loss,
    train_student,
)
from tests.support.runs import SETTINGS, lines, stream_of, tiny_cache, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_leaves_a_student_its_identity_and_a_log(
    undisturbed: Path, reader: CacheReader, vanilla: Path
) -> None:
    final = undisturbed / "final"
    model = AutoModelForImageTextToText.from_pretrained(final)
    assert AutoProcessor.from_pretrained(final).image_token_id == model.config.image_token_id
    record = json.loads((final / "emkd_run.json").read_text())
    assert record["identity"]["cache"] == reader.fingerprint
    assert record["identity"]["teacher"] == reader.spec.teacher_weights
    assert record["identity"]["recipe"]["objective"]["vlad_weight"] == 25.0
    assert record["settings"] == json.loads(json.dumps(dataclasses.asdict(SETTINGS)))
    assert record["num_samples"] == 28
    assert not [path for path in final.iterdir() if path.suffix == ".bin"]
    start, _ = student_loader(vanilla)()
    before, after = start.state_dict(), weights(final)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {n for n in after if n.startswith(("model.multi_modal", "model.language"))}

    log = lines(undisturbed)
    assert [line["step"] for line in log] == [2, 4, 6, 7]
    assert [line["samples"] for line in log] == [8, 16, 24, 28]
    assert [line["epoch"] for line in log] == [0.8, 1.6, 2.4, 2.8]
    names = ("supervised", "rld", "vsd", "vlad")
    for line in log:
        total = sum(line[f"weight/{name}"] * line[f"term/{name}"] for name in names)
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        assert 0 < line["diagnostic/vsd_teacher_kept_mass"] < 1
    assert [line["step"] for line in log if "gradient/vsd" in line] == [4]
    assert all(log[1][f"gradient/{name}"] > 0 for name in names)


def test_a_finished_run_returns_at_once_and_other_runs_are_refused(
    undisturbed: Path, reader: CacheReader, vanilla: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}

    def throwing() -> Any:
        raise AssertionError("a finished run loads no student")

    finished = train_student(undisturbed, reader, throwing, SETTINGS, student="tiny")
    assert finished.num_samples == 28
    others = {
        "recipe.seed: stored 0, wanted 1": replace(SETTINGS, seed=1),
        "recipe.batch_size": replace(SETTINGS, batch_size=8),
        "recipe.objective.vsd_weight": replace(SETTINGS, objective=preset("rld")),
        "num_steps: stored 7, wanted 9": replace(SETTINGS, max_steps=9),
    }
    for message, settings in others.items():
        with pytest.raises(CacheMismatchError, match=message):
            train(undisturbed, reader, vanilla, settings)
    with pytest.raises(CacheMismatchError, match="student: stored 'tiny', wanted 'other'"):
        train(undisturbed, reader, vanilla, student="other")
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_another_cache_is_refused_before_anything_is_overwritten(
    undisturbed: Path, vanilla: Path, tmp_path: Path
) -> None:
    other = tiny_cache(tmp_path / "cache", vanilla, num_samples=9)
    with pytest.raises(CacheMismatchError, match="cache: stored"):
        train(undisturbed, other, vanilla)


def test_threads_reports_and_measurements_do_not_change_the_weights(
    undisturbed: Path, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = replace(
        SETTINGS,
        loader_threads=0,
        grad_norm_steps=0,
        match_check_steps=3,
        log_steps=5,
        save_steps=100,
    )
    reported: list[Mapping[str, float]] = []
    shown: list[tuple[str, int, int]] = []
    train_student(
        run,
        reader,
        student_loader(vanilla),
        settings,
        student="tiny",
        report=reported.append,
        progress=lambda *what: shown.append(what),
    )
    assert [line["step"] for line in reported] == [5, 7]
    regrets = [v for line in reported for k, v in line.items() if k.endswith("_regret")]
    assert regrets == [0.0, 0.0]  # of steps 3 and 6: all of a small vocabulary is compared anyway
    checked = [("preflight", count, 10) for count in range(1, 11)]
    assert shown == checked + [("steps", step, 7) for step in range(1, 8)]
    mine, theirs = weights(run / "final"), weights(undisturbed / "final")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_step_adds_up_the_shares_of_its_micro_batches(
    reader: CacheReader, vanilla: Path, tmp_path: Path, micro: int
) -> None:
    settings = replace(SETTINGS, max_steps=1, micro_batch_size=micro, log_steps=1)
    train(tmp_path / "run", reader, vanilla, settings)
    model, processor = student_loader(vanilla)()
    set_trainable(model, settings.train_parts)
    encode = SampleEncoder(processor, model.config).encode
    stream = stream_of(reader, encode, objective=settings.objective, micro_batch_size=micro)
    assets = TeacherAssets(sketch=reader.sketch_basis(), template=reader.tail_template())
    batches = list(islice(stream, 4 // micro))
    spans = [sample.spans for batch in batches for sample in batch.model.samples]
    counts = StepCounts.of_spans(spans, settings.objective.vlad_text)
    shares = [
        student_loss(model, batch, settings.objective, assets, counts=counts).total
        for batch in batches
    ]
    total = torch.stack(shares).sum()
    total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    (line,) = lines(tmp_path / "run")
    assert line["loss"] == pytest.approx(float(total.detach()), rel=1e-6)
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert line["diagnostic/vsd_tail_is_blend"] == 1.0
    assert line["diagnostic/rld_tail_is_blend_template"] == 1.0
    for term in ("rld", "vsd"):
        lower, upper = (line[f"diagnostic/{term}_{side}_bound"] for side in ("lower", "upper"))
        assert 0 <= lower < upper < float("inf")


def test_mixed_precision_and_checkpointing_train(
    reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    settings = replace(
        SETTINGS, max_steps=2, dtype="bfloat16", gradient_checkpointing=True, device="auto"
    )
    train(tmp_path / "run", reader, vanilla, settings)
    assert {v.dtype for v in weights(tmp_path / "run" / "final").values()} == {torch.float32}


def test_no_teacher_runs_while_the_student_trains(
    reader: CacheReader, vanilla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def throwing(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the student's training touched a teacher")

    for name in ("__init__", "load", "outputs", "hidden_states"):
        monkeypatch.setattr(Teacher, name, throwing)
    train(tmp_path / "run", reader, vanilla, replace(SETTINGS, max_steps=1))
    with pytest.raises(AssertionError, match="touched a teacher"):
        Teacher.load("anything")


def test_what_cannot_work_is_refused_and_leaves_the_folder_free(
    reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="not a multiple of micro_batch_size"):
        train(run, reader, vanilla, replace(SETTINGS, micro_batch_size=3))
    with pytest.raises(ValueError, match="expected auto, cpu or cuda"):
        train(run, reader, vanilla, replace(SETTINGS, device="tpu"))
    exact = replace(ObjectiveConfig(), tail="exact")
    with pytest.raises(ValueError, match="tail=exact"):
        train(run, reader, vanilla, replace(SETTINGS, objective=exact))
    with pytest.raises(ValueError, match="tail=exact"):  # before any model is loaded
        train(run, reader, tmp_path / "no student", replace(SETTINGS, objective=exact))
    with pytest.raises(ValueError, match=r"float16 .* bfloat16 or float32"):
        train(run, reader, vanilla, replace(SETTINGS, dtype="float16"))
    half, processor = student_loader(vanilla)()
    with pytest.raises(ValueError, match="load the student in float32"):
        train_student(run, reader, lambda: (half.half(), processor), SETTINGS, student="tiny")
    train(run, reader, vanilla, replace(SETTINGS, max_steps=1))


def test_a_diverged_run_stops(reader: CacheReader, vanilla: Path, tmp_path: Path) -> None:
    settings = replace(
        SETTINGS, objective=preset("rld"), learning_rate=1e30, warmup_ratio=0.0, log_steps=1
    )
    with pytest.raises(ValueError, match="lower learning_rate"):
        train(tmp_path / "run", reader, vanilla, settings)


def test_identity_names_everything_that_shapes_the_weights() -> None:
    recipe = {field.name for field in dataclasses.fields(SETTINGS.recipe)}
    how = {field.name for field in dataclasses.fields(SETTINGS)} - recipe
    assert how == {
        "max_steps", "epochs", "micro_batch_size", "shard", "gradient_checkpointing", "device",
        "loader_threads", "save_steps", "log_steps", "grad_norm_steps",
        "match_check_steps", "on_bad_sample",
    }  # fmt: skip
    assert {f.name for f in dataclasses.fields(RunIdentity)} == {
        "cache", "teacher", "student", "num_steps", "recipe", "loss_means", "skipped",
    }  # fmt: skip
    assert replace(SETTINGS, max_steps=None, epochs=2.5).num_steps(10) == 7


def test_micro_batches_without_images_do_not_stop_a_projector_that_is_trained_alone(
    reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    alone = replace(SETTINGS, train_parts=("projector",), micro_batch_size=1, grad_norm_steps=1)
    train(tmp_path / "run", reader, vanilla, alone)
    before = student_loader(vanilla)()[0].state_dict()
    after = weights(tmp_path / "run" / "final")
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if name.startswith("model.multi_modal")}
