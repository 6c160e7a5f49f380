"""A cache with a grid is resumed, extended, held against its teacher and shown like others."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.build.build import build
from pipeline.build.extend_records import extend_records
from pipeline.build.extend_samples import extend_samples
from pipeline.config.build import BuildConfig
from pipeline.inspection.cache import describe_cache
from pipeline.inspection.sample import describe_sample
from pipeline.inspection.verify_teacher import render_teacher, verify_teacher
from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.verify import verify_cache
from teacher_cache.schema.options import GridSettings, RecordKind, RecordSettings
from tests.support.builders import build as build_of
from tests.support.extended import assert_same_rows, build_config, extension
from tests.support.llava_json import shard_bytes
from tests.support.tiny import tiny_llava

GRID = GridSettings(compressor="dart", ratios=(0.3, 0.6), layer=1)


def config(folder: Path, model: Path, records: RecordKind, count: int = 6) -> BuildConfig:
    return build_config(folder, model, records, count).with_settings(grid=GRID)


def sound(path: Path | str, model: Path) -> CacheReader:
    assert verify_cache(path).problems == ()
    reader = CacheReader.open(path)
    report = verify_teacher(reader, str(model), device="cpu")
    assert report.problems == ()
    assert all(quantity.stored.largest == 0 for quantity in report.quantities)
    return reader


class Killed(BaseException):
    """Stands for the end of a process."""


def test_a_build_that_is_cut_off_and_run_again_has_the_same_bytes(
    tmp_path: Path, llava: Path
) -> None:
    whole = config(tmp_path, llava, "topk+hidden", 12)
    build(whole)
    for steps in (1, 2, 3):
        cut = dataclasses.replace(whole, out=str(tmp_path / f"cut-{steps}"))
        left = steps

        def progress(what: str, _done: int, _all: int) -> None:
            nonlocal left
            left -= what == "samples"
            if left < 0:
                raise Killed

        with pytest.raises(Killed):
            build(cut, progress)
        build(cut)
        assert shard_bytes(cut.out) == shard_bytes(whole.out)


def test_new_samples_get_the_grid_of_the_old(tmp_path: Path, llava: Path) -> None:
    base, everything = (config(tmp_path, llava, "topk+hidden", count) for count in (6, 12))
    build(base)
    build(everything)
    more = extension(base.out, tmp_path / "more", llava, source=everything.source.path)
    extend_samples(more)
    found, expected = sound(more.out, llava), CacheReader.open(everything.out)
    same = {"template_digest": found.spec.template_digest}  # that of the six old samples
    assert found.spec == dataclasses.replace(expected.spec, **same)
    assert_same_rows(found, expected)


@pytest.mark.parametrize(("held", "added"), [("topk", "hidden"), ("hidden", "topk")])
def test_new_records_get_a_grid_too(
    tmp_path: Path, llava: Path, held: RecordKind, added: RecordKind
) -> None:
    base, both = (config(tmp_path, llava, records) for records in (held, "topk+hidden"))
    build(base)
    build(both)
    settings: dict[str, Any] = {"top_k": 6} if added == "topk" else {"hidden_dtype": "float32"}
    more = extension(
        base.out, tmp_path / "more", llava, settings=RecordSettings(records=added, **settings)
    )
    extend_records(more)
    found, expected = sound(more.out, llava), CacheReader.open(both.out)
    assert found.spec == expected.spec
    assert found.parts >= {"response_grid", "hidden_grid"}
    assert_same_rows(found, expected)


@pytest.mark.parametrize("records", ["topk", "hidden"])
def test_a_grid_of_another_teacher_is_found(
    tmp_path: Path, llava: Path, records: RecordKind
) -> None:
    ours = config(tmp_path / "own", llava, records)
    theirs = config(tmp_path / "other", tiny_llava(tmp_path / "model", seed=1), records)
    build(ours)
    build(theirs)
    own, other = CacheReader.open(ours.out), CacheReader.open(theirs.out)
    rows = [own.read(index, own.parts) for index in range(len(own))]
    for number, row in enumerate(rows):
        lies = other.read(number, other.parts).output
        grids = {"response_grid": lies.response_grid, "hidden_grid": lies.hidden_grid}
        output = dataclasses.replace(row.output, **grids)  # pyright: ignore[reportArgumentType]
        rows[number] = dataclasses.replace(row, output=output)
    head = own.head() if records == "hidden" else None
    forged, template = tmp_path / "forged", own.tail_template()
    build_of(forged, [rows[:3], rows[3:]], spec=own.spec, head=head, template=template)
    report = verify_teacher(CacheReader.open(tmp_path / "forged"), str(llava), device="cpu")
    failed = {quantity.name for quantity in report.quantities if quantity.failed}
    assert failed
    assert all(" at 0.3" in name or " at 0.6" in name for name in failed)
    assert any("at 0.6" in line for line in render_teacher(report))


def test_a_grid_is_shown(tmp_path: Path, llava: Path) -> None:
    settings = config(tmp_path, llava, "topk+hidden")
    build(settings)
    reader = CacheReader.open(settings.out)
    shown = describe_cache(reader)
    assert shown["spec"]["grid"]["compressor"] == "dart"
    assert {"response", "response at 0.3", "response at 0.6"} <= shown["tail_mass"].keys()
    parts = shown["bytes_of_parts"]
    assert parts["response_grid"] > parts["response"]
    assert parts["hidden_grid"] > 0
    sample = describe_sample(reader, reader.keys[0])
    positions = sample["response_top_k"]["positions"]
    for ratio in ("0.3", "0.6"):
        assert sample["response_top_k_at_ratio"][ratio]["positions"] == positions
        assert sample["predicting_states_at_ratio"][ratio][0] == positions
    json.dumps([shown, sample])
