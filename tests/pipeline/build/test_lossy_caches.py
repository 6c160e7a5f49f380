"""A cache with codecs says what the exact one of the same teacher says, within its promises."""

from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.divergence.divergence import reverse_kl
from student_train.signals.from_cache import vision_signal
from teacher_cache.codec.columns import TIER_PARTS
from teacher_cache.folder.reader import CacheReader
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.options import RecordKind, RecordSettings
from teacher_cache.schema.teacher_output import TeacherOutput
from teacher_cache.teacher.teacher import Teacher
from tests.support.caches import build_cache
from tests.support.tiny import tiny_samples


@pytest.fixture(scope="module")
def teacher(llava: Path) -> Teacher:
    return Teacher.load(str(llava), device="cpu", dtype="float32")


def _cache(folder: Path, teacher: Teacher, records: RecordKind, **changes: Any) -> CacheReader:
    settings = RecordSettings(records=records, top_k=32, **changes)
    samples = tiny_samples(4)
    return build_cache(folder, teacher, samples, settings, samples_per_shard=2)


def _outputs(reader: CacheReader) -> list[TeacherOutput]:
    parts = TIER_PARTS[reader.spec.records]
    return [reader.read(index, parts).output for index in range(len(reader))]


def test_a_cut_by_mass_keeps_the_beginning_of_what_all_positions_keep(
    tmp_path: Path, teacher: Teacher
) -> None:
    reader = _cache(tmp_path / "cut", teacher, "topk", top_p=0.05, min_k=2)
    assert (reader.spec.top_p, reader.spec.min_k) == (0.05, 2)
    seen: set[int] = set()
    exact = _outputs(_cache(tmp_path / "all", teacher, "topk"))
    for whole, cut in zip(exact, _outputs(reader), strict=True):
        for left, right in ((whole.vision, cut.vision), (whole.response, cut.response)):
            assert left is not None
            assert right is not None
            assert torch.equal(left.logsumexp, right.logsumexp)
            for row, count in enumerate(right.counts.tolist()):
                seen.add(count)
                assert right.ids[row, :count].tolist() == left.ids[row, :count].tolist()
                assert torch.equal(right.logits[row, :count], left.logits[row, :count])
                dropped = (left.logits[row, count:] - left.logsumexp[row]).exp().sum()
                tail = left.log_tail[row].exp() + dropped
                torch.testing.assert_close(right.log_tail[row].exp(), tail)
    assert len(seen) > 1
    assert min(seen) >= 2


@pytest.mark.parametrize(
    ("records", "changes"),
    [
        ("topk", {"logits_codec": "affine8", "affinity_dtype": "int8"}),
        ("topk", {"logits_codec": "affine8", "top_p": 0.05}),
        ("hidden", {"hidden_dtype": "int8", "hidden_group": 16}),
    ],
)
def test_a_student_is_told_nearly_the_same(
    tmp_path: Path, teacher: Teacher, records: RecordKind, changes: dict[str, Any]
) -> None:
    allowed = {"affinity_max_error": 0.004}
    kept = {name: value for name, value in changes.items() if name == "top_p"}
    reader = _cache(tmp_path / "lossy", teacher, records, **changes, **allowed)
    plain = {"hidden_dtype": "float32", "affinity_dtype": "float32"}
    exact = _cache(tmp_path / "exact", teacher, records, **plain, **kept)
    head = teacher.head if records == "hidden" else None
    for one, two in zip(_outputs(exact), _outputs(reader), strict=True):
        num_vision = sum(view.num_tokens for view in one.views)
        if not num_vision:
            continue
        generator = torch.Generator().manual_seed(0)
        student = torch.randn(num_vision, reader.spec.vocab_size, generator=generator)
        wanted, found = (
            reverse_kl(student, vision_signal(output, TeacherAssets(head=head))).value
            for output in (one, two)
        )
        torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.01)
        if one.affinity is not None and two.affinity is not None:
            apart = (one.affinity.cosine - two.affinity.cosine).abs()
            assert float(apart.max()) <= 0.004
