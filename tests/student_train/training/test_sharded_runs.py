"""Promises of a run whose student is sharded: the weights, and the files, of one that is not.

Two processes over gloo, one sample a micro-batch. Some of the samples have no image, so that time
and again one rank runs the vision tower and the projector and the other does not.
"""

import os
import random
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.config.objective import ObjectiveConfig, preset
from student_train.config.progression import ProgressionConfig
from student_train.config.recipe import TrainerSettings
from student_train.data.stream import TrainingStream
from student_train.training.checkpoint import CHECKPOINT_FILE
from student_train.training.trainable import set_trainable
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.folder.reader import CacheReader
from teacher_cache.records.assets import TeacherAssets
from tests.support.caches import student_loader
from tests.support.children import finish, kill_once_logged, start_ranks
from tests.support.epic import save_deep, train_vanilla
from tests.support.lazy import AutoModelForImageTextToText, student_loss
from tests.support.paths import TinyFolder
from tests.support.runs import (
    SETTINGS,
    assert_nearly_same_run,
    assert_same_run,
    interrupted,
    lines,
    on_one_thread,
    on_ranks,
    stream_of,
    tiny_cache,
    train,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ONE = replace(SETTINGS, micro_batch_size=1)
EVERY_STEP = replace(ONE, log_steps=1)
VSD_ALONE = ObjectiveConfig(supervised_weight=0.0, rld_weight=0.0, vlad_weight=0.0)
CASES = {
    "emkd, all parts": replace(
        ONE, train_parts=("vision_tower", "projector", "language_model"), weight_decay=0.1
    ),
    "rld, clipped, no projector": replace(
        ONE, objective=preset("rld"), max_grad_norm=0.1, train_parts=("language_model",)
    ),
    "projector alone, some micro-batches without images": replace(ONE, train_parts=("projector",)),
    "vsd, whose head only samples with images ask": replace(ONE, objective=VSD_ALONE),
    "supervised, bfloat16, checkpointing": replace(
        ONE, objective=preset("supervised"), dtype="bfloat16", gradient_checkpointing=True
    ),
}


def sharded(settings: TrainerSettings) -> TrainerSettings:
    return replace(settings, shard="fsdp")


def assert_nearly_same(run: Path, other: Path) -> None:
    names = ("loss", "grad_norm", "learning_rate", "samples")
    assert_nearly_same_run(run, other, *names, key_bias=3e-4)


@pytest.fixture(scope="module")
def straight(reader: CacheReader, vanilla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded run that nothing has disturbed."""
    run = tmp_path_factory.mktemp("straight") / "run"
    on_ranks(2, train, run, reader, vanilla, sharded(EVERY_STEP))
    return run


@pytest.fixture(scope="module")
def whole(reader: CacheReader, vanilla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, unsharded."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(run, reader, vanilla, EVERY_STEP)
    return run


def both_streams(reader: CacheReader, model: Any, processor: Any) -> list[TrainingStream]:
    """What each of the two ranks reads."""
    encode = SampleEncoder(processor, model.config).encode
    return [
        stream_of(reader, encode, micro_batch_size=1, rank=rank, world_size=2) for rank in (0, 1)
    ]


def test_ranks_differ_in_having_images(reader: CacheReader, vanilla: Path) -> None:
    """Else the tests here would show nothing of what hangs most easily."""
    streams = both_streams(reader, *student_loader(vanilla)())
    pairs = islice(zip(*map(iter, streams), strict=True), 14)
    shown = [["pixel_values" in batch.model.inputs for batch in pair] for pair in pairs]
    assert [False, True] in shown
    assert [True, False] in shown


@pytest.mark.parametrize("case", CASES)
def test_two_sharded_workers_compute_what_one_computes(
    case: str, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    settings = replace(CASES[case], max_steps=4)
    train(tmp_path / "one", reader, vanilla, settings)
    on_ranks(2, train, tmp_path / "two", reader, vanilla, sharded(settings))
    assert_nearly_same(tmp_path / "two", tmp_path / "one")


def test_a_tied_head_gets_the_gradients_of_both_its_uses(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    tied, settings = tiny_folder("llava_next"), replace(ONE, max_steps=3)
    reader = tiny_cache(tmp_path / "cache", tied)
    train(tmp_path / "one", reader, tied, settings)
    on_ranks(2, train, tmp_path / "two", reader, tied, sharded(settings))
    assert_nearly_same(tmp_path / "two", tmp_path / "one")
    assert "lm_head.weight" not in weights(tmp_path / "two" / "final")


def test_epic_runs_its_second_pass_on_all_ranks_or_none(tmp_path: Path) -> None:
    vanilla = save_deep(tmp_path / "deep")
    reader = tiny_cache(tmp_path / "cache", vanilla)
    settings = replace(
        ONE,
        max_steps=4,
        objective=preset("epic-tcd"),
        progression=ProgressionConfig(schedule="tcd"),
        gradient_checkpointing=True,
    )
    train_vanilla(tmp_path / "one", reader, vanilla, settings)
    on_ranks(2, train_vanilla, tmp_path / "two", reader, vanilla, sharded(settings))
    assert_nearly_same(tmp_path / "two", tmp_path / "one")
    assert any(line["term/kd"] > 1e-6 for line in lines(tmp_path / "two"))


def test_the_logged_gradient_norms_are_those_of_the_mean_over_the_ranks(
    reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    settings = replace(ONE, max_steps=1, grad_norm_steps=1, log_steps=1)
    on_ranks(2, train, tmp_path / "two", reader, vanilla, sharded(settings))
    model, processor = student_loader(vanilla)()
    set_trainable(model, settings.train_parts)
    assets = TeacherAssets(sketch=reader.sketch_basis(), template=reader.tail_template())
    pair = next(zip(*map(iter, both_streams(reader, model, processor)), strict=True))
    each = [student_loss(model, batch, settings.objective, assets).terms for batch in pair]
    (line,) = lines(tmp_path / "two")
    trained = [p for p in model.parameters() if p.requires_grad]
    for name in each[0]:
        mean = (each[0][name] + each[1][name]) / 2
        found = torch.autograd.grad(mean, trained, retain_graph=True, materialize_grads=True)
        norm = torch.stack([gradient.norm() for gradient in found]).norm()
        assert line[f"gradient/{name}"] == pytest.approx(float(norm), rel=1e-4)


def test_killed_and_run_again_it_goes_on_and_ends_with_the_same_bits(
    straight: Path, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    work = (on_one_thread, train, run, reader, vanilla, sharded(EVERY_STEP))
    log, num_lines = run / "metrics.jsonl", random.Random(os.getpid()).randint(4, 6)
    kill_once_logged(log, num_lines, *start_ranks(2, *work))
    assert (run / "checkpoint-3" / CHECKPOINT_FILE).exists()
    assert finish(*start_ranks(2, *work)) == [0, 0]
    assert_same_run(run, straight)


def test_an_unsharded_run_goes_on_from_a_sharded_ones_files(
    straight: Path, whole: Path, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    assert_same_files(straight, whole)
    resumed = interrupted(tmp_path / "run", straight, 3)
    train(resumed, reader, vanilla, EVERY_STEP)
    assert_nearly_same(resumed, whole)


def test_a_sharded_run_goes_on_from_an_unsharded_ones_with_any_number_of_workers(
    whole: Path, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    resumed = interrupted(tmp_path / "run", whole, 3)
    on_ranks(4, train, resumed, reader, vanilla, sharded(EVERY_STEP))
    assert_nearly_same(resumed, whole)


def test_what_is_left_is_a_plain_model(straight: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(straight / "final")
    found, stored = model.state_dict(), weights(straight / "final")
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    assert model.config.architectures == ["AvgPoolLlavaForConditionalGeneration"]


def test_what_cannot_be_sharded_is_refused(
    reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    remedy = "only one worker; give --num-workers 2 or more, or --shard none"
    with pytest.raises(ValueError, match=remedy):
        train(tmp_path / "run", reader, vanilla, sharded(ONE))
    with pytest.raises(ValueError, match="take dtype bfloat16"):
        replace(ONE, shard="fsdp", dtype="float16")
    assert not (tmp_path / "run").exists()


def assert_same_files(run: Path, other: Path) -> None:
    """Checkpoints of equal structure, with weights and optimizer states equal to rounding."""
    for name in ("final", "checkpoint-3", "checkpoint-6"):
        found, expected = ({p.name for p in (of / name).iterdir()} for of in (run, other))
        assert {n for n in found if "rng" not in n} == {n for n in expected if "rng" not in n}
    mine, theirs = (
        torch.load(of / "checkpoint-6" / "optimizer.pt", weights_only=True) for of in (run, other)
    )
    assert_close(mine, theirs)


def assert_close(mine: Any, theirs: Any) -> None:
    assert type(mine) is type(theirs)
    if isinstance(mine, Mapping):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert_close(mine[name], theirs[name])
    elif isinstance(mine, list):
        for one, other in zip(mine, theirs, strict=True):
            assert_close(one, other)
    elif isinstance(mine, torch.Tensor):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)
    else:
        assert mine == theirs
