"""Promises of preflight.py: every misfit is known before the first step, and none is invented."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from student_train.config.objective import ObjectiveConfig, preset
from student_train.config.recipe import TrainerSettings
from student_train.data.misfits import StudentLimits, find_misfits
from student_train.data.same_text import check_against_teacher
from student_train.data.stream import StudentBatch
from student_train.training.checkpoint import PREFLIGHT_FILE, RUN_FILE, FinishedRun
from teacher_cache.encoding.collate import collate
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.encoding.size_encoder import SizeEncoder
from teacher_cache.folder.reader import CacheReader
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.checked_json import from_checked_json
from teacher_cache.schema.errors import CacheMismatchError, ShardCorruptError
from teacher_cache.schema.strict_json import decode_mapping
from tests.conftest import TinyFolder
from tests.support.builders import flip
from tests.support.lazy import (
    output_head,
    student_from_vanilla,
    student_loss,
    train_student,
    vanilla_student,
)
from tests.support.runs import (
    SETTINGS,
    assert_nearly_same_run,
    assert_same_run,
    interrupted,
    lines,
    on_ranks,
    tiny_cache,
)
from tests.support.tiny import LISTED
from tests.support.tiny_parts import template

pytestmark = pytest.mark.usefixtures("one_thread")

SKIP = replace(SETTINGS, on_bad_sample="skip")
CONTEXT = 36
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + template("<image>")
)
"""Two of ten tiny samples have a system message: numbers 4 and 9."""


def load_short(vanilla: Path) -> Any:
    """A pooled student whose context is too short for some samples."""
    model, processor = student_from_vanilla(str(vanilla), stride=2, dtype=torch.float32)
    model.config.text_config.max_position_embeddings = CONTEXT
    return model, processor


def load_plain(vanilla: Path) -> Any:
    return student_from_vanilla(str(vanilla), stride=2, dtype=torch.float32)


def train(
    run: Path,
    reader: CacheReader,
    vanilla: Path,
    settings: TrainerSettings = SETTINGS,
    load: Callable[[Path], Any] = load_plain,
    chat_template: str | None = REFUSES_SYSTEM,
) -> FinishedRun:
    loaded = partial(load, vanilla)
    return train_student(run, reader, loaded, settings, student="s", chat_template=chat_template)


def stored(run: Path) -> Any:
    from student_train.training.preflight import Preflight

    fields = from_checked_json((run / PREFLIGHT_FILE).read_bytes(), PREFLIGHT_FILE)
    return decode_mapping(Preflight, fields, PREFLIGHT_FILE)


@pytest.fixture(scope="module")
def skipping(reader: CacheReader, vanilla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run without the samples 4 and 9."""
    run = tmp_path_factory.mktemp("skipping") / "run"
    train(run, reader, vanilla, SKIP)
    return run


def test_all_misfits_are_refused_at_once_by_cause_before_the_first_step(
    reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    begun: list[str] = []
    with pytest.raises(CacheMismatchError) as error:
        train_student(
            run,
            reader,
            partial(load_short, vanilla),
            SETTINGS,
            student="s",
            chat_template=REFUSES_SYSTEM,
            begin=lambda: begun.append("begun"),
        )
    text = str(error.value)
    long = [
        index
        for index in range(10)
        if index not in (4, 9) and num_tokens(reader, vanilla, index) > CONTEXT
    ]
    assert 0 < len(long) < 8
    assert f"{2 + len(long)} of 10 samples of" in text
    assert (
        "2 x the chat template refuses the conversation: no system role ('tiny-4', 'tiny-9')"
        in text
    )
    assert f"{len(long)} x it has " in text
    assert f"the model's context holds {CONTEXT}; shorten it or leave it out ('tiny-" in text
    assert "--on-bad-sample skip" in text
    assert [path.name for path in run.iterdir()] == [PREFLIGHT_FILE]
    assert begun == []
    assert [m.source_id for m in stored(run).misfits] == [
        f"tiny-{index}" for index in sorted([4, 9, *long])
    ]
    assert all(m.key == reader.keys[int(m.source_id[5:])] for m in stored(run).misfits)


def num_tokens(reader: CacheReader, vanilla: Path, index: int) -> int:
    model, processor = load_plain(vanilla)
    return SampleEncoder(processor, model.config).encode(reader.read(index, ()).sample).num_tokens


def test_skipped_samples_are_left_out_recorded_and_part_of_the_run(
    skipping: Path, reader: CacheReader, vanilla: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert [misfit.source_id for misfit in stored(skipping).misfits] == ["tiny-4", "tiny-9"]
    assert {misfit.reason for misfit in stored(skipping).misfits} == {
        "the chat template refuses the conversation: no system role"
    }
    identity = json.loads((skipping / RUN_FILE).read_text())
    assert identity["skipped"]["num_samples"] == 2
    before = {path: path.stat().st_mtime_ns for path in skipping.rglob("*")}
    train(skipping, reader, vanilla, SKIP)  # it has finished
    with pytest.raises(CacheMismatchError, match=r"skipped.*: stored .*wanted None"):
        train(skipping, reader, vanilla, SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in skipping.rglob("*")} == before


def test_what_is_skipped_is_said_and_shortens_an_epoch(
    reader: CacheReader, vanilla: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    epoch = replace(SKIP, max_steps=None, epochs=1.0, log_steps=1)
    finished = train(run, reader, vanilla, epoch)
    assert finished.identity.num_steps == 2  # 8 samples in steps of 4
    assert lines(run)[-1]["samples"] == 8
    (said,) = [r.message for r in caplog.records if "skipped" in r.message]
    assert "2 of 10 samples do not fit the student and are skipped" in said
    assert str(run / PREFLIGHT_FILE) in said


def test_a_run_that_skips_resumes_to_the_same_bits_without_checking_again(
    skipping: Path,
    reader: CacheReader,
    vanilla: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = interrupted(tmp_path / "run", skipping, 3)

    def throwing(*_: object) -> None:
        raise AssertionError("the cache was checked again")

    with monkeypatch.context() as patch:
        patch.setattr("student_train.training.run.check_cache", throwing)
        train(run, reader, vanilla, SKIP)
    assert_same_run(run, skipping)
    other = interrupted(tmp_path / "other", skipping, 3)
    (other / PREFLIGHT_FILE).unlink()
    train(other, reader, vanilla, SKIP)  # checked anew, with the same result
    assert_same_run(other, skipping)
    assert stored(other) == stored(skipping)


def test_a_resume_that_would_skip_other_samples_is_refused_and_nothing_changes(
    skipping: Path, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = interrupted(tmp_path / "run", skipping, 3)
    (run / PREFLIGHT_FILE).unlink()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(CacheMismatchError, match=r"skipped.*: stored"):
        train(run, reader, vanilla, SKIP, load_short)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_ranks_share_the_check_and_all_know_the_result(
    skipping: Path, reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    on_ranks(2, train, run, reader, vanilla, SKIP)
    assert stored(run) == stored(skipping)
    assert_nearly_same_run(run, skipping, "samples", "loss", rel=1e-4)


def train_expecting_damage(run: Path, reader: CacheReader, vanilla: Path, file: str) -> None:
    with pytest.raises(ShardCorruptError, match=file):
        train(run, reader, vanilla, chat_template=None)
    assert not run.exists()


def test_damage_that_one_rank_finds_stops_them_all(
    reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(reader.cache.url, tmp_path / "cache"))
    file = reader.seal.shards[-1].files[0].file  # of the second rank
    flip(cache / file, reader.read(9, ()).sample.images[0])
    opened = CacheReader.open(cache)
    on_ranks(2, train_expecting_damage, tmp_path / "run", opened, vanilla, Path(file).name)


def test_a_refused_student_is_not_loaded_again_and_another_one_is_checked_anew(
    reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(CacheMismatchError, match="2 of 10"):
        train(run, reader, vanilla)

    def throwing(_folder: Path) -> Any:
        raise AssertionError("the student was loaded again")

    with pytest.raises(CacheMismatchError, match="2 of 10"):
        train(run, reader, vanilla, load=throwing)
    train(run, reader, vanilla, chat_template=None)  # the remedy
    assert stored(run).misfits == ()


def test_nothing_is_trained_where_no_sample_fits(
    reader: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def load(folder: Path) -> Any:
        model, processor = load_plain(folder)
        model.config.text_config.max_position_embeddings = 3
        return model, processor

    for settings, message in ((SKIP, "none of the 10 samples"), (SETTINGS, "10 of 10 samples")):
        assert not run.exists()
        with pytest.raises(CacheMismatchError, match=message):
            train(run, reader, vanilla, settings, load)


def by_running_each(
    reader: CacheReader, model: Any, encoder: SampleEncoder, objective: ObjectiveConfig
) -> list[str]:
    """The samples on which encoding, comparison or the loss itself fails, one after the other."""
    bad: list[str] = []
    assets = TeacherAssets(sketch=reader.sketch_basis(), template=reader.tail_template())
    for index, key in enumerate(reader.keys):
        cached = reader.read(index, ("vision", "sketch", "affinity", "response"))
        try:
            encoded = encoder.encode(cached.sample)
            check_against_teacher(encoded, cached.output, objective.matching.scope)
            batch = StudentBatch(
                model=collate([encoded], encoder.pad_token_id, "right"), outputs=(cached.output,)
            )
            student_loss(model, batch, objective, assets).total.backward()
        except Exception:
            bad.append(key)
    return bad


@pytest.mark.parametrize("family", sorted(LISTED))
def test_the_check_passes_exactly_what_training_takes(
    family: str, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    vanilla, objective = tiny_folder(family), preset("emkd")
    reader = tiny_cache(tmp_path / "cache", vanilla, num_samples=5)
    outcomes = set[int]()
    for change in (unchanged, short_context, few_embeddings, failing_processor, refusing_template):
        model, processor = vanilla_student(str(vanilla), dtype=torch.float32)
        encoder = SampleEncoder(processor, model.config)
        change(model, encoder, reader)
        limits = StudentLimits(
            scope=objective.matching.scope,
            num_embeddings=len(cast(torch.Tensor, model.get_input_embeddings().weight)),
            num_rows=output_head(model).get_parameter("weight").shape[0],
        )
        fast = SizeEncoder(encoder)
        found = find_misfits(reader, range(5), fast.encode, encoder.encode, limits)
        wanted = by_running_each(reader, model, encoder, objective)
        assert [misfit.key for _, misfit in found] == wanted, change.__name__
        outcomes.add(len(wanted))
    assert 0 in outcomes
    assert len(outcomes) > 1


def unchanged(_model: Any, _encoder: SampleEncoder, _reader: CacheReader) -> None:
    return


def lengths(encoder: SampleEncoder, reader: CacheReader) -> list[int]:
    return sorted(encoder.encode(reader.read(i, ()).sample).num_tokens for i in range(5))


def short_context(model: Any, encoder: SampleEncoder, reader: CacheReader) -> None:
    model.config.get_text_config().max_position_embeddings = lengths(encoder, reader)[2]


def few_embeddings(model: Any, encoder: SampleEncoder, reader: CacheReader) -> None:
    """The embeddings lack the highest id that only some samples use."""
    top = sorted(
        int(encoder.encode(reader.read(i, ()).sample).inputs["input_ids"].max()) for i in range(5)
    )
    embeddings = model.get_input_embeddings()
    embeddings.weight = torch.nn.Parameter(embeddings.weight[: top[-1]].detach().clone())


def failing_processor(_model: Any, encoder: SampleEncoder, _reader: CacheReader) -> None:
    """A library's error that is no ValueError, for images of one size."""
    real = encoder.processor.image_processor

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def __call__(self, images: Any, **settings: Any) -> Any:
            flat = [one for each in images for one in (each if isinstance(each, list) else [each])]
            if any(image.height > image.width for image in flat):
                raise ZeroDivisionError("division by zero")
            return real(images, **settings)

    encoder.processor.image_processor = Failing()


def refusing_template(_model: Any, encoder: SampleEncoder, _reader: CacheReader) -> None:
    processor = encoder.processor
    refuse = "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}"
    processor.chat_template = refuse + processor.chat_template
    encoder.template.__init__(processor, encoder.rules)
