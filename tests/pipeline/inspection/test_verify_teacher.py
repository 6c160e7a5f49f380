"""Promises of pipeline/inspection/verify_teacher.py: the cache's own teacher passes, no other."""

import dataclasses
from pathlib import Path

import pytest

from pipeline.inspection.verify_teacher import TeacherReport, render_teacher, verify_teacher
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.options import RecordKind, RecordSettings
from teacher_cache.teacher.teacher import Teacher
from tests.support.builders import build
from tests.support.caches import build_cache
from tests.support.paths import TinyFolder
from tests.support.tiny import tiny_llava, tiny_llava_next, tiny_samples

TIERS: tuple[RecordKind, ...] = ("topk", "topk+sketch", "hidden")


def _reader(cache: Path, model: Path, records: RecordKind = "topk+sketch") -> CacheReader:
    teacher = Teacher.load(str(model), device="cpu")
    settings = RecordSettings(records=records, top_k=12, sketch_rank=6, hidden_dtype="float32")
    return build_cache(cache, teacher, tiny_samples(6), settings, samples_per_shard=3)


@pytest.mark.parametrize("records", TIERS)
def test_the_caches_own_teacher_passes(
    tmp_path: Path, tiny_folder: TinyFolder, records: RecordKind
) -> None:
    model = tiny_folder("llava_next")  # its last bits depend on the batch
    reader = _reader(tmp_path, model, records)
    seen: list[tuple[str, int, int]] = []
    report = verify_teacher(
        reader, str(model), device="cpu", progress=lambda *step: seen.append(step)
    )
    assert report.problems == report.other_teacher == ()
    assert report.samples == 6
    assert seen == [("teacher", 3, 6), ("teacher", 6, 6)]
    names = {quantity.name for quantity in report.quantities}
    assert ("hidden states" in names) == (records == "hidden")
    assert ("vision logits" in names) == (records != "hidden")
    for quantity in report.quantities:
        assert quantity.stored.rms == quantity.stored.largest == quantity.failed == 0
    assert any(quantity.control.largest > 0 for quantity in report.quantities)
    text = "\n".join(render_teacher(report))
    assert all(name in text for name in names)


def test_samples_are_drawn_in_the_builds_batches(tmp_path: Path, llava: Path) -> None:
    reader = _reader(tmp_path, llava, "topk")
    reports = [verify_teacher(reader, str(llava), num_samples=2, device="cpu") for _ in range(2)]
    assert reports[0] == reports[1]
    assert reports[0].samples == 3


def test_a_cache_built_one_by_one_has_a_control_in_pairs(
    tmp_path: Path, tiny_folder: TinyFolder
) -> None:
    model = tiny_folder("llava_next")
    settings = RecordSettings(records="hidden", hidden_dtype="float32")
    teacher = Teacher.load(str(model), device="cpu")
    reader = build_cache(tmp_path, teacher, tiny_samples(3), settings, samples_per_shard=1)
    report = verify_teacher(reader, str(model), device="cpu")
    assert report.problems == ()
    (states,) = report.quantities
    assert states.stored.largest == 0 < states.control.largest


def test_another_teacher_is_refused_before_it_runs(tmp_path: Path, tiny_folder: TinyFolder) -> None:
    reader = _reader(tmp_path / "cache", tiny_folder("llava"))
    other = tiny_llava(tmp_path / "other", seed=1)
    report = verify_teacher(reader, str(other), device="cpu")
    assert (report.samples, report.quantities) == (0, ())
    assert [name for name, _, _ in report.other_teacher] == ["teacher_weights"]
    assert "it differs in teacher_weights" in report.problems[0]
    wide = verify_teacher(reader, str(tiny_folder("qwen2_5_vl")), device="cpu")
    fields = {name for name, _, _ in wide.other_teacher}
    assert {"teacher_class", "tokenizer", "image_processor"} <= fields
    (line,) = render_teacher(report)
    assert reader.spec.teacher_weights in line


LOSSY = (
    RecordSettings(records="topk", top_k=12, logits_codec="affine8", affinity_dtype="int8"),
    RecordSettings(records="topk+sketch", top_k=12, top_p=0.7, min_k=2, sketch_rank=6),
    RecordSettings(records="hidden", hidden_dtype="int8", hidden_group=8),
)


@pytest.mark.parametrize("settings", LOSSY, ids=["affine8", "mass", "int8"])
def test_a_lossy_cache_is_held_to_what_it_would_store(
    tmp_path: Path, tiny_folder: TinyFolder, settings: RecordSettings
) -> None:
    model = tiny_folder("llava_next")
    settings = dataclasses.replace(
        settings, logits_max_error=1.0, affinity_max_error=1.0, hidden_max_error=1.0
    )
    own, other = (
        Teacher.load(str(folder), device="cpu")
        for folder in (model, tiny_llava_next(tmp_path / "other", seed=1))
    )
    reader = build_cache(tmp_path / "own", own, tiny_samples(5), settings, samples_per_shard=3)
    report = verify_teacher(reader, str(model), device="cpu")
    assert report.problems == ()
    assert all(quantity.stored.largest == 0 for quantity in report.quantities)
    false = build_cache(tmp_path / "false", other, tiny_samples(5), settings, samples_per_shard=3)
    rows = [false.read(index, false.parts) for index in range(len(false))]
    head = own.head if settings.records == "hidden" else None
    build(
        tmp_path / "forged",
        [rows[:3], rows[3:]],
        spec=reader.spec,
        head=head,
        sketch=own.sketch,
        template=reader.tail_template(),
    )
    report = verify_teacher(CacheReader.open(tmp_path / "forged"), str(model), device="cpu")
    assert len({problem.split(":")[0] for problem in report.problems}) == 5


def _forged(tmp_path: Path, model: Path, records: RecordKind) -> TeacherReport:
    """A cache with the numbers of another teacher under the spec of `model`'s."""
    forger = tiny_llava(tmp_path / "other", seed=1)
    settings = RecordSettings(records=records, top_k=12, sketch_rank=6, hidden_dtype="float32")
    own = _reader(tmp_path / "own", model, records)
    false = build_cache(
        tmp_path / "false",
        Teacher.load(str(forger), device="cpu"),
        tiny_samples(6),
        settings,
        samples_per_shard=3,
    )
    rows = [false.read(index, false.parts) for index in range(len(false))]
    sketched, hidden = records == "topk+sketch", records == "hidden"
    build(
        tmp_path / "forged",
        [rows[:3], rows[3:]],
        spec=own.spec,
        head=own.head() if hidden else None,
        sketch=own.sketch_basis() if sketched else None,
        template=own.tail_template(),
    )
    return verify_teacher(CacheReader.open(tmp_path / "forged"), str(model), device="cpu")


@pytest.mark.parametrize("records", TIERS)
def test_numbers_of_another_teacher_are_found_whatever_the_spec_says(
    tmp_path: Path, llava: Path, records: RecordKind
) -> None:
    report = _forged(tmp_path, llava, records)
    assert report.other_teacher == ()
    for quantity in report.quantities:  # text without an image has no vision records
        assert quantity.failed >= 4 or "tail" in quantity.name
    keys = {sample.key for sample in tiny_samples(6)}
    assert all(any(key in problem for problem in report.problems) for key in keys)


def test_one_sample_with_anothers_records_is_named(tmp_path: Path, llava: Path) -> None:
    own = _reader(tmp_path / "own", llava, "topk")
    rows = [own.read(index, own.parts) for index in range(len(own))]
    wrong = rows[0].output.response
    assert wrong is not None
    shifted = dataclasses.replace(
        wrong, ids=wrong.ids.roll(1, 0), logits=wrong.logits.roll(1, 0), log_tail=wrong.log_tail
    )
    output = dataclasses.replace(rows[0].output, response=shifted)
    rows[0] = dataclasses.replace(rows[0], output=output)
    template = own.tail_template()
    build(tmp_path / "forged", [rows[:3], rows[3:]], spec=own.spec, template=template)
    report = verify_teacher(CacheReader.open(tmp_path / "forged"), str(llava), device="cpu")
    assert len(report.problems) == 1
    assert rows[0].sample.key in report.problems[0]
    assert "response logits" in report.problems[0]
    assert report.ids_replaced[0] > 0


def test_settings_follow_from_the_spec(tmp_path: Path, llava: Path) -> None:
    reader = _reader(tmp_path / "hidden", llava, "hidden")
    assert reader.spec.settings.records == "hidden"
    assert reader.spec.settings.hidden_dtype == reader.spec.hidden_dtype
    assert _reader(tmp_path / "top", llava).spec.settings.top_k == 12
