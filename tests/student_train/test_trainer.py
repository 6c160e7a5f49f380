"""Promises of a training run: exact resume after SIGKILL, refusals, logs, and no teacher."""

import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from student_train.checkpoint import CHECKPOINT_FILE, FinishedRun, RunIdentity
from student_train.objective import ObjectiveConfig, preset
from student_train.settings import TrainerSettings
from student_train.signals import TeacherAssets
from student_train.stream import BatchPlan, TrainingStream
from student_train.student import set_trainable
from student_train.trainer import student_loss
from student_train.training_run import train_student
from teacher_cache.manifest import CacheMismatchError
from teacher_cache.reader import CacheReader
from teacher_cache.records import RecordSettings
from teacher_cache.teacher import Teacher
from teacher_cache.tokens import SampleEncoder
from tests.caches import build_cache, student_loader
from tests.conftest import TinyFolder
from tests.tiny import tiny_samples

ROOT = Path(__file__).resolve().parents[2]
PAIRS = RecordSettings(records="topk+sketch", top_k=16, sketch_rank=8)
SETTINGS = TrainerSettings(
    max_steps=7,
    batch_size=4,
    micro_batch_size=2,
    learning_rate=1e-3,
    save_steps=3,
    log_steps=2,
    grad_norm_steps=4,
    device="cpu",
)


@pytest.fixture(scope="module")
def vanilla(tiny_folder: TinyFolder) -> Path:
    return tiny_folder("llava")


@pytest.fixture(scope="module")
def reader(vanilla: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    teacher = Teacher.load(str(vanilla), device="cpu", dtype="float32")
    cache = tmp_path_factory.mktemp("trainer") / "cache"
    return build_cache(cache, teacher, tiny_samples(10), PAIRS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(
    run: Path, reader: CacheReader, vanilla: Path, settings: TrainerSettings = SETTINGS, **kw: Any
) -> FinishedRun:
    return train_student(run, reader, student_loader(vanilla), settings, **{"student": "tiny"} | kw)


@pytest.fixture(scope="module")
def undisturbed(
    reader: CacheReader, vanilla: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    torch.set_num_threads(1)
    train(run, reader, vanilla)
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, other: Path) -> None:
    """Equal final weights to the bit, and equal metrics, wall time apart."""
    mine, theirs = weights(run / "final"), weights(other / "final")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for line, wanted in zip(lines(run), lines(other), strict=True):
        assert {**line, "seconds": 0} == {**wanted, "seconds": 0}


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
    teacher = Teacher.load(str(vanilla), device="cpu", dtype="float32")
    other = build_cache(tmp_path / "cache", teacher, tiny_samples(9), PAIRS)
    with pytest.raises(CacheMismatchError, match="cache: stored"):
        train(undisturbed, other, vanilla)


def test_killed_at_any_moment_and_run_again_ends_with_the_same_bits(
    reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    every_step = replace(SETTINGS, log_steps=1)
    straight = tmp_path / "straight"
    train(straight, reader, vanilla, every_step)
    command = run_command(run, reader, vanilla, every_step)
    victim = random.Random(os.getpid()).randint(1, 6)
    log = run / "metrics.jsonl"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (
            log.exists() and len(log.read_text().splitlines()) >= victim
        ):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert_same_run(run, straight)


@pytest.mark.parametrize("step", [3, 6])
def test_resuming_continues_logging_windows_and_drops_lines_of_lost_steps(
    undisturbed: Path, reader: CacheReader, vanilla: Path, tmp_path: Path, step: int
) -> None:
    """As if killed after the last step and before `final/`, with a half-written checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "final")
    (run / "checkpoint-6" / CHECKPOINT_FILE).unlink() if step == 3 else None
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 1.0, "seconds": 50')  # torn by the kill
    train(run, reader, vanilla)
    assert_same_run(run, undisturbed)
    assert lines(run)[-1]["seconds"] > lines(undisturbed)[-1]["seconds"]


def test_a_checkpoint_of_another_run_is_not_resumed_from(
    undisturbed: Path, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed / "checkpoint-6", run / "checkpoint-6")
    with pytest.raises(CacheMismatchError, match=r"wrote .*checkpoint-6[\s\S]*recipe.seed"):
        train(run, reader, vanilla, replace(SETTINGS, seed=3))


def test_threads_and_measurements_do_not_change_the_weights(
    undisturbed: Path, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(
        run,
        reader,
        vanilla,
        replace(SETTINGS, loader_threads=0, grad_norm_steps=0, log_steps=5, save_steps=100),
    )
    mine, theirs = weights(run / "final"), weights(undisturbed / "final")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_step_takes_the_mean_over_its_micro_batches(
    reader: CacheReader, vanilla: Path, tmp_path: Path, micro: int
) -> None:
    settings = replace(SETTINGS, max_steps=1, micro_batch_size=micro, log_steps=1)
    train(tmp_path / "run", reader, vanilla, settings)
    model, processor = student_loader(vanilla)()
    set_trainable(model, settings.train_parts)
    stream = TrainingStream(
        reader,
        SampleEncoder(processor, model.config).encode,
        objective=settings.objective,
        pad_token_id=0,
        seed=settings.seed,
        plan=BatchPlan(batch_size=4, micro_batch_size=micro),
    )
    assets = TeacherAssets(sketch=reader.sketch_basis())
    batches = islice(stream, 4 // micro)
    totals = [student_loss(model, batch, settings, assets).total for batch in batches]
    mean = torch.stack(totals).mean()
    mean.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    (line,) = lines(tmp_path / "run")
    assert line["loss"] == pytest.approx(float(mean.detach()), rel=1e-6)
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def run_command(
    run: Path, reader: CacheReader, vanilla: Path, settings: TrainerSettings
) -> list[str]:
    text = json.dumps(dataclasses.asdict(settings))
    module = ["-W", "ignore", "-m", "tests.student_train.killed_run"]
    return [sys.executable, *module, str(run), str(reader.cache), str(vanilla), text]


def test_two_workers_compute_what_one_computes_and_one_goes_on_from_them(
    undisturbed: Path, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = run_command(run, reader, vanilla, SETTINGS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in ("0", "1")
    ]
    assert [worker.wait(timeout=100) for worker in workers] == [0, 0]
    for _ in range(2):
        mine, theirs = weights(run / "final"), weights(undisturbed / "final")
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], atol=1e-5, rtol=1e-4)
        for line, wanted in zip(lines(run), lines(undisturbed), strict=True):
            assert line["samples"] == wanted["samples"]
            assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        shutil.rmtree(run / "final")
        train(run, reader, vanilla)


def test_mixed_precision_and_checkpointing_train(
    reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, max_steps=2, dtype="bfloat16", gradient_checkpointing=True)
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
        "max_steps", "epochs", "micro_batch_size", "gradient_checkpointing", "device",
        "loader_threads", "save_steps", "log_steps", "grad_norm_steps",
    }  # fmt: skip
    assert {f.name for f in dataclasses.fields(RunIdentity)} == {
        "cache", "teacher", "student", "num_steps", "recipe",
    }  # fmt: skip
    assert replace(SETTINGS, max_steps=None, epochs=2.5).num_steps(10) == 7
