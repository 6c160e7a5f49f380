"""From `emkd build --ratios` to the KD term: a student learns at the ratio of its step."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from pipeline.build.response_grid import compression_at, with_grid
from student_train.compression.compression import compress
from student_train.config.objective import preset
from student_train.config.progression import ProgressionConfig
from student_train.data.batch_plan import BatchPlan
from student_train.data.stream import StudentBatch, TrainingStream
from student_train.epic.step_plan import StepPlan, plan_step
from student_train.models.forward import final_hidden, output_head
from teacher_cache.encoding.collate import ModelBatch
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.options import GridSettings, RecordSettings, TierName
from teacher_cache.teacher.teacher import Teacher
from tests.conftest import TinyFolder
from tests.support.caches import build_cache
from tests.support.deep import NUM_LAYERS, deep_model
from tests.support.lazy import student_loss
from tests.support.tiny import tiny_samples

GRID = GridSettings(compressor="dart", layer=2, ratios=(0.25, 0.5, 0.75))


@pytest.fixture(scope="module")
def teacher(tiny_folder: TinyFolder) -> Teacher:
    return with_grid(Teacher(*deep_model(tiny_folder("llava"))), GRID)


def fixed(ratio: float, gap: float) -> StepPlan:
    """A step that drops this much with DART, and asks for a teacher who drops `gap` less."""
    progression = ProgressionConfig(preset="fixed", ratio=ratio, gap=gap)
    return plan_step(progression, seed=0, step=1, num_steps=4, num_layers=NUM_LAYERS, grid=GRID)


@torch.no_grad()
def logits(model: torch.nn.Module, batch: ModelBatch, ratio: float) -> torch.Tensor:
    """Every logit at the positions that predict the batch's response tokens, under compression."""
    with compress(model, compression_at(GRID, ratio), batch) as found:
        hidden = final_hidden(model, batch.inputs)
    rows = [
        hidden[row, found.layout.columns(row, sample.spans.predicting)]
        for row, sample in enumerate(batch.samples)
    ]
    return output_head(model)(torch.cat(rows))


def first_batch(
    folder: Path, teacher: Teacher, tier: TierName
) -> tuple[StudentBatch, TeacherAssets]:
    """A micro-batch of epic-cached-tcd from a cache that knows every logit."""
    records = RecordSettings(
        records=tier,
        top_k=teacher.head.vocab_size,
        hidden_dtype="float32",
        affinity_dtype="float32",
        grid=GRID,
    )
    reader = build_cache(folder, teacher, tiny_samples(6), records)
    stream = TrainingStream(
        reader,
        teacher.encoder.encode,
        objective=preset("epic-cached-tcd"),
        tier=tier,
        pad_token_id=0,
        seed=0,
        plan=BatchPlan(batch_size=4, micro_batch_size=4),
    )
    head = reader.head() if tier == "hidden" else None
    return next(islice(iter(stream), 1)), TeacherAssets(head=head)


@pytest.mark.parametrize("tier", ["topk", "hidden"])
def test_the_kd_term_is_that_of_the_teacher_at_the_grids_ratio(
    tmp_path: Path, teacher: Teacher, tier: TierName
) -> None:
    batch, assets = first_batch(tmp_path, teacher, tier)
    model, num_rows = teacher.model, teacher.head.vocab_size
    objective = preset("epic-cached-tcd")
    seen: dict[float, float] = {}
    for gap, ratio in ((0.0, 0.75), (0.25, 0.5), (0.3, 0.25), (0.6, 0.0)):
        plan = fixed(0.75, gap)
        assert plan.cached_ratio == ratio
        with torch.no_grad():
            loss = student_loss(model, batch, objective, assets, plan)
        mine = logits(model, batch.model, 0.75)[:, :num_rows].log_softmax(dim=1)
        theirs = logits(model, batch.model, ratio)[:, :num_rows].log_softmax(dim=1)
        expected = (theirs.exp() * (theirs - mine)).sum(dim=1).mean()
        seen[ratio] = float(loss.terms["kd"])
        assert seen[ratio] == pytest.approx(float(expected), abs=1e-6)
        assert loss.diagnostics["cached_ratio"] == ratio
    assert abs(seen[0.75]) < 1e-6  # the student is the teacher, and drops the same tokens
    assert seen[0.25] > 10 * abs(seen[0.75])


def test_a_cache_without_a_grid_teaches_with_every_token(tmp_path: Path, teacher: Teacher) -> None:
    batch, assets = first_batch(tmp_path, teacher, "hidden")
    objective, plan = preset("epic-cached-tcd"), fixed(0.75, 0.0)
    plain = [replace(output, hidden_grid=None) for output in batch.outputs]
    without = replace(batch, outputs=tuple(plain))
    with torch.no_grad():
        none = replace(plan, cached_ratio=0.0)
        zero = student_loss(teacher.model, batch, objective, assets, none)
        found = student_loss(teacher.model, without, objective, assets, plan)
    assert torch.equal(found.terms["kd"], zero.terms["kd"])
