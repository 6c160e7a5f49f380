"""EPIC with a cached teacher, and together with EM-KD's terms: every term is that of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.build.response_grid import with_grid
from student_train.config.objective import EpicName, ObjectiveConfig, preset
from student_train.config.progression import ProgressionConfig
from student_train.config.recipe import TrainRecipe
from student_train.data.stream import StudentBatch, parts_needed
from student_train.models.forward import output_head
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.folder.reader import CacheReader
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.options import GridSettings, RecordSettings
from teacher_cache.teacher.teacher import Teacher
from tests.support.caches import build_cache
from tests.support.deep import compressed, deep_model
from tests.support.epic import fixed, gradients, plan, save_deep, train_vanilla
from tests.support.lazy import student_loss
from tests.support.runs import SETTINGS, lines, stream_of, tiny_cache
from tests.support.tiny import tiny_samples

SAMPLES = tiny_samples(5)
GRID = GridSettings(compressor="random", layer=2, ratios=(0.25, 0.5))
WHOLE = RecordSettings(records="topk", grid=GRID)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = save_deep(tmp_path_factory.mktemp("teacher"))
    return with_grid(Teacher.load(str(folder), device="cpu", dtype="float32"), GRID)


@pytest.fixture(scope="module")
def reader(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    """Every logit of the response, at no, a quarter and half of the vision tokens dropped."""
    settings = replace(WHOLE, top_k=teacher.head.vocab_size)
    folder = tmp_path_factory.mktemp("combined") / "cache"
    return build_cache(folder, teacher, SAMPLES, settings, samples_per_shard=len(SAMPLES))


@pytest.fixture(scope="module")
def student(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of other weights than the teacher."""
    model, processor = deep_model(save_deep(tmp_path_factory.mktemp("student")))
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in model.get_decoder().parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model, SampleEncoder(processor, model.config)


def batch_from(reader: CacheReader, student: Any, objective: ObjectiveConfig) -> StudentBatch:
    sizes = {"batch_size": len(SAMPLES), "micro_batch_size": len(SAMPLES)}
    encode = student[1].encode
    return next(iter(stream_of(reader, encode, objective=objective, tier="topk", **sizes)))


def loss_of(reader: CacheReader, student: Any, objective: ObjectiveConfig, step: Any) -> Any:
    batch = batch_from(reader, student, objective)
    return student_loss(student[0], batch, objective, TeacherAssets(), step)


@torch.no_grad()
def dense_divergence(teacher: Teacher, student: Any, batch: StudentBatch, step: Any) -> Tensor:
    """Forward KL of both models' whole logits, the teacher with what the grid drops, in loops."""
    model = student[0]
    hidden, found = compressed(model, step.student, batch.model, step.student_draw)
    mine = output_head(model)(hidden)
    hidden, other = compressed(teacher.model, step.teacher, batch.model)
    theirs = output_head(teacher.model)(hidden)
    size = teacher.head.vocab_size
    values: list[Tensor] = []
    for row, sample in enumerate(batch.model.samples):
        for position in sample.spans.predicting:
            where = torch.stack([position])
            log_q = mine[row, found.columns(row, where)[0], :size].log_softmax(dim=0)
            log_p = theirs[row, other.columns(row, where)[0], :size].log_softmax(dim=0)
            values.append((log_p.exp() * (log_p - log_q)).sum())
    return torch.stack(values).mean()


@pytest.mark.parametrize(("ratio", "cached"), [(0.5, 0.0), (0.6, 0.25), (0.8, 0.5), (0.9, 0.5)])
def test_of_all_logits_it_is_the_forward_divergence_from_the_teacher_that_drops_as_much(
    ratio: float, cached: float, teacher: Teacher, reader: CacheReader, student: Any
) -> None:
    step = replace(plan(fixed("random", ratio=ratio)), cached_ratio=cached)
    objective = preset("epic-cached-tcd")
    found = loss_of(reader, student, objective, step)
    batch = batch_from(reader, student, objective)
    stage = replace(step.teacher.stages[0], ratio=cached)
    live = replace(step, teacher=replace(step.teacher, stages=(stage,), seed=GRID.seed))
    expected = dense_divergence(teacher, student, batch, live)
    torch.testing.assert_close(found.terms["kd"].detach(), expected, rtol=1e-4, atol=1e-6)
    assert found.diagnostics["cached_ratio"] == cached
    assert found.tails == {"kd": "exact"}


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("epic-tcd", {"vsd_weight": 0.25, "vlad_weight": 25.0}),
        ("epic-tcd", {"rld_weight": 0.5}),
        ("epic-cached-tcd", {"rld_weight": 0.5, "vsd_weight": 0.25, "vlad_weight": 25.0}),
    ],
)
def test_together_every_term_is_what_it_is_alone(
    name: EpicName, others: dict[str, float], reader: CacheReader, student: Any
) -> None:
    step = plan(fixed("dart", ratio=0.8))
    both = loss_of(reader, student, replace(preset(name), **others), step)
    epic = loss_of(reader, student, preset(name), step)
    emkd = loss_of(
        reader,
        student,
        replace(ObjectiveConfig(rld_weight=0.0, vsd_weight=0.0, vlad_weight=0.0), **others),
        step,
    )
    alone = {**emkd.terms, **epic.terms}
    assert both.terms.keys() == alone.keys()
    total = torch.zeros(())
    for term, value in alone.items():
        torch.testing.assert_close(both.terms[term], value, rtol=1e-5, atol=1e-7)
        assert float(value.detach()) > 0
        total = total + both.weights[term] * value
    torch.testing.assert_close(both.total, total, rtol=1e-5, atol=0)
    wanted = gradients(student[0], total)
    for weight, gradient in gradients(student[0], both.total).items():
        torch.testing.assert_close(gradient, wanted[weight], rtol=1e-3, atol=1e-5)


def test_kept_tokens_alone_are_matched(reader: CacheReader, student: Any) -> None:
    found = loss_of(reader, student, preset("emkd"), plan(fixed("random")))
    pairs = [None if a is None else a.num_pairs for a in found.assignments]
    kept = found.diagnostics["vision_tokens_kept"]
    shown = [count for count in pairs if count is not None]
    assert len(shown) == 4
    assert sum(shown) / 4 == kept == 5.0  # 4, 4, 8 and 4 of 16, 16, 32 and 16


def test_only_the_cached_variant_reads_the_grid() -> None:
    for tier, part in (("topk", "response"), ("topk+sketch", "response"), ("hidden", "hidden")):
        kind: Any = tier
        assert parts_needed(preset("epic-cached-lcd"), kind) == {part}
        assert parts_needed(preset("epic-cached-lcd"), kind, True) == {part, f"{part}_grid"}
        assert parts_needed(preset("epic-tcd"), kind, True) == frozenset()
        assert "response_grid" not in parts_needed(preset("emkd"), kind, True)


@pytest.mark.parametrize("name", ["epic-cached-tcd", "epic-cached-lcd"])
def test_a_run_learns_from_the_grid(name: EpicName, reader: CacheReader, tmp_path: Path) -> None:
    vanilla = save_deep(tmp_path)
    progression = fixed("random", ratio=0.8) if name == "epic-cached-tcd" else None
    settings = replace(
        SETTINGS,
        objective=preset(name),
        progression=progression or ProgressionConfig(schedule="lcd"),
        max_steps=4,
        log_steps=1,
    )
    train_vanilla(tmp_path / "run", reader, vanilla, settings)
    ratios = [line["diagnostic/cached_ratio"] for line in lines(tmp_path / "run")]
    assert ratios == ([0.5] * 4 if name == "epic-cached-tcd" else [0, 0, 0, 0])
    assert all(line["term/kd"] >= 0 for line in lines(tmp_path / "run"))


def test_what_has_no_meaning_is_refused(tmp_path: Path, reader: CacheReader) -> None:
    with pytest.raises(ValueError, match="gap would have no effect"):
        TrainRecipe(progression=replace(fixed(), gap=0.1))
    TrainRecipe(objective=preset("epic-tcd"), progression=replace(fixed(), gap=0.1))
    with pytest.raises(ValueError, match="kd is 0 at every step"):
        TrainRecipe(objective=preset("epic-tcd"), progression=replace(fixed(), gap=0.0))
    TrainRecipe(objective=preset("epic-tcd"), progression=replace(fixed("random"), gap=0.0))
    TrainRecipe(objective=preset("epic-cached-tcd"), progression=replace(fixed(), gap=0.0))
    vanilla = save_deep(tmp_path)
    few = tiny_cache(tmp_path / "few", vanilla, num_samples=2)  # 16 logits of each token, no grid
    cached = replace(SETTINGS, objective=preset("epic-cached-tcd"), progression=fixed())
    unseen = tmp_path / "no model is loaded"
    for message, objective, progression in (
        ("tail=exact", replace(cached.objective, tail="exact"), fixed()),
        ("temperature 2", replace(cached.objective, temperature=2.0), fixed()),
        ("gap is 0.1, but would have no effect", cached.objective, replace(fixed(), gap=0.1)),
    ):
        changed = replace(cached, objective=objective, progression=progression)
        with pytest.raises(ValueError, match=message):
            train_vanilla(tmp_path / "run", few, unseen, changed)
    deeper = replace(cached, progression=replace(fixed(layer=3), gap=0.1))
    with pytest.raises(ValueError, match="drops at layer 3, deeper than the cache's teacher"):
        train_vanilla(tmp_path / "run", reader, unseen, deeper)
    assert not (tmp_path / "run").exists()
