"""A cache of several tiers: each is the one that a cache of it alone holds, and can be learned."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from student_train.config.objective import preset
from student_train.data.batch_plan import BatchPlan
from student_train.data.stream import StudentBatch, TrainingStream
from student_train.losses.require_served import require_served
from student_train.signals.from_cache import vision_signal
from student_train.signals.teacher_signal import HiddenSignal
from student_train.signals.top_k import TopKSignal
from teacher_cache.codec.columns import output_columns
from teacher_cache.folder.reader import CacheReader
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.options import RecordKind, RecordSettings, TierName
from teacher_cache.teacher.teacher import Teacher
from tests.support.caches import build_cache
from tests.support.strategies import assert_same_bits
from tests.support.tiny import tiny_samples

TIERS: tuple[TierName, ...] = ("topk", "topk+sketch", "hidden")


def _cache(folder: Path, teacher: Teacher, records: RecordKind) -> CacheReader:
    settings = RecordSettings(records=records, top_k=8, sketch_rank=4)
    return build_cache(folder / records, teacher, tiny_samples(5), settings, samples_per_shard=3)


@pytest.fixture(scope="module")
def teacher(llava: Path) -> Teacher:
    return Teacher.load(str(llava), device="cpu", dtype="float32")


def test_every_column_is_that_of_the_tier_alone(tmp_path: Path, teacher: Teacher) -> None:
    both = _cache(tmp_path, teacher, "topk+sketch+hidden")
    assert both.parts == {"vision", "sketch", "affinity", "response", "hidden"}
    assert both.sketch_basis().digest == both.spec.sketch_digest
    assert both.head().digest == both.spec.head_digest
    for tier in TIERS:
        alone = _cache(tmp_path, teacher, tier)
        for index in range(len(both)):
            columns = output_columns(both.read(index, alone.parts).output)
            expected = output_columns(alone.read(index, alone.parts).output)
            assert columns.keys() == expected.keys()
            for name, values in columns.items():
                assert_same_bits(values, expected[name])


def _first_batch(reader: CacheReader, teacher: Teacher, tier: TierName) -> StudentBatch:
    stream = TrainingStream(
        reader,
        teacher.encoder.encode,
        objective=preset("emkd"),
        tier=tier,
        pad_token_id=0,
        seed=0,
        plan=BatchPlan(batch_size=4, micro_batch_size=4),
    )
    return next(islice(iter(stream), 1))


@pytest.mark.parametrize("tier", TIERS)
def test_a_student_learns_from_the_tier_that_was_chosen(
    tmp_path: Path, teacher: Teacher, tier: TierName
) -> None:
    both, alone = (_cache(tmp_path, teacher, name) for name in ("topk+sketch+hidden", tier))
    assets = TeacherAssets(
        head=both.head() if tier == "hidden" else None,
        sketch=both.sketch_basis() if tier == "topk+sketch" else None,
    )
    wanted = _first_batch(alone, teacher, tier).outputs
    known = {tuple(output.content_ids.tolist()): output for output in wanted}
    found = _first_batch(both, teacher, tier).outputs
    for output in found:
        signal = vision_signal(output, assets)
        assert isinstance(signal, HiddenSignal if tier == "hidden" else TopKSignal)
        expected = known.get(tuple(output.content_ids.tolist()))
        if expected is not None:
            assert output_columns(output).keys() == output_columns(expected).keys()


def test_an_objective_is_rehearsed_on_the_tier_that_was_chosen(
    tmp_path: Path, teacher: Teacher
) -> None:
    reader = _cache(tmp_path, teacher, "topk+hidden")
    require_served(preset("emkd"), reader.spec, TeacherAssets(head=reader.head()), "hidden")
    with pytest.raises(ValueError, match=r"topk\+sketch"):
        require_served(preset("emkd"), reader.spec, TeacherAssets(), "topk")
    assert torch.equal(reader.head().weight, teacher.head.weight)
