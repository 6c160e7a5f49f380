"""Promises of emkd extend: what is added is what a build would have made, what was there stays."""

import dataclasses
import uuid
from pathlib import Path
from typing import Any

import pytest

from pipeline.build.build import build
from pipeline.build.extend_records import RecordExtender, extend_records, joined
from pipeline.build.extend_samples import extend_samples
from pipeline.config.extend import ExtendConfig
from pipeline.inspection.verify_teacher import verify_teacher
from teacher_cache.codec.columns import output_columns
from teacher_cache.derive.subset import Selection, subset_cache
from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.verify import verify_cache
from teacher_cache.records.calibration import Calibration
from teacher_cache.schema.errors import CacheMismatchError
from teacher_cache.schema.options import RecordKind, RecordSettings
from tests.support.builders import published
from tests.support.changed import changed
from tests.support.children import run_script
from tests.support.extended import (
    assert_same_rows,
    build_config,
    built,
    extension,
    more_records,
    more_samples,
    samples_to_cache,
)
from tests.support.llava_json import write_llava_json
from tests.support.tiny import tiny_llava


def _sound(out: Path, model: Path) -> CacheReader:
    assert verify_cache(out).problems == ()
    reader = CacheReader.open(out)
    assert verify_teacher(reader, str(model), device="cpu").problems == ()
    return reader


def test_extended_by_samples_is_built_from_all(tmp_path: Path, llava: Path) -> None:
    base = built(tmp_path, llava, "topk+hidden")
    before = published(base)
    more_samples(tmp_path, llava, tmp_path / "more", "topk+hidden")
    # Shards are batches here, so that each sample has the neighbours that it has in a build of all.
    everything = CacheReader.open(built(tmp_path, llava, "topk+hidden", 12))
    more = _sound(tmp_path / "more", llava)
    assert more.spec == CacheReader.open(base).spec, "its template, too"
    same = dataclasses.replace(everything.spec, template_digest=more.spec.template_digest)
    assert more.spec == same
    assert_same_rows(more, everything)
    assert len(more) == 12
    assert any(more.read(index, ()).output.shared_from for index in range(12))
    assert published(base) == before
    for commit, old in zip(more.seal.shards, CacheReader.open(base).seal.shards, strict=False):
        assert (tmp_path / "more" / commit.files[0].file).samefile(base / old.files[0].file)


def test_new_samples_are_coded_by_the_sketch_of_the_old(tmp_path: Path, llava: Path) -> None:
    base = CacheReader.open(built(tmp_path, llava, "topk+sketch"))
    more_samples(tmp_path, llava, tmp_path / "more")
    more = _sound(tmp_path / "more", llava)  # of the codes, too
    assert (len(more), more.spec) == (12, base.spec)
    at_once = CacheReader.open(built(tmp_path, llava, "topk+sketch", 12))
    assert at_once.spec.sketch_digest != base.spec.sketch_digest  # it is fitted to all of a source


def test_caches_without_template_and_least_probabilities_stay_without_them(
    tmp_path: Path, llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(build_config(tmp_path, llava, "topk", 6), least_logits=False)
    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "template", lambda _: None)
        build(config)
    base = CacheReader.open(config.out)
    assert (base.spec.template_digest, base.spec.least_logits) == (None, False)
    more_samples(tmp_path, llava, tmp_path / "more", "topk")
    more = _sound(tmp_path / "more", llava)
    assert (len(more), more.spec) == (12, base.spec)
    sketch = extension(
        config.out,
        tmp_path / "sketch",
        llava,
        settings=RecordSettings(records="topk+sketch", sketch_rank=4),
    )
    extend_records(sketch)
    spec = _sound(tmp_path / "sketch", llava).spec
    assert spec.sketch_digest is not None
    assert (spec.template_digest, spec.least_logits) == (None, False)


@pytest.mark.parametrize(
    ("held", "added", "both"),
    [
        ("topk+sketch", "hidden", "topk+sketch+hidden"),
        ("hidden", "topk+sketch", "topk+sketch+hidden"),
        ("topk", "topk+sketch", "topk+sketch"),
        ("topk+hidden", "topk+sketch+hidden", "topk+sketch+hidden"),
        ("topk", "hidden", "topk+hidden"),
    ],
)
def test_extended_by_records_is_built_with_all_of_them(
    tmp_path: Path, llava: Path, held: RecordKind, added: RecordKind, both: RecordKind
) -> None:
    base = built(tmp_path, llava, held)
    before = published(base)
    config = extension(base, tmp_path / "more", llava, settings=RecordSettings(records=added))
    new = set(both.split("+")) - set(held.split("+"))
    if "hidden" in new:
        config = changed(config, hidden_dtype="float32")
    if "sketch" in new:
        config = changed(config, sketch_rank=4)
    if "topk" in new:
        config = changed(config, top_k=6)
    extend_records(config)
    more = _sound(tmp_path / "more", llava)
    at_once = CacheReader.open(built(tmp_path / "once", llava, both))
    assert more.spec == at_once.spec
    assert_same_rows(more, at_once)
    assert published(base) == before
    for commit, old in zip(more.seal.shards, CacheReader.open(base).seal.shards, strict=True):
        assert (tmp_path / "more" / commit.files[0].file).samefile(base / old.files[0].file)
        assert len(commit.files) == 2
    # Layered shards are ordinary ones to the other tools.
    subset_cache(tmp_path / "more", tmp_path / "part", Selection(keys=more.keys[1:4]))
    part = _sound(tmp_path / "part", llava)
    for index, key in enumerate(part.keys):
        ours = output_columns(part.read(index, part.parts).output)
        theirs = output_columns(more.read(more.find(key), more.parts).output)
        assert all(ours[name].equal(values) for name, values in theirs.items())


@pytest.mark.parametrize("what", ["samples", "records"])
def test_an_extension_that_is_killed_and_run_again_leaves_the_same_bytes(
    memory_folder: Path, what: str
) -> None:
    run_script("extended", what, memory_folder)


def test_another_teacher_is_refused_with_a_table(tmp_path: Path, llava: Path) -> None:
    built(tmp_path, llava, "topk+sketch")
    other = tiny_llava(tmp_path / "other", seed=1)
    for extend in (more_samples, more_records):
        with pytest.raises(CacheMismatchError, match=r"not the teacher of the cache:\n *teacher_w"):
            extend(tmp_path, other, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_a_source_without_anything_new_is_refused(tmp_path: Path, llava: Path) -> None:
    base = built(tmp_path, llava, "topk")
    source = write_llava_json(tmp_path / "known", samples_to_cache()[2:5])
    config = extension(base, tmp_path / "x", llava, source=str(source))
    with pytest.raises(ValueError, match="all of its 3 usable samples are in"):
        extend_samples(config)


def test_bad_samples_are_refused_or_recorded(tmp_path: Path, llava: Path) -> None:
    base = built(tmp_path, llava, "topk")
    source = Path(build_config(tmp_path, llava, "topk", 12).source.path)
    next(source.parent.glob("tiny-711-*.png")).unlink()
    config = extension(base, tmp_path / "x", llava, source=str(source))
    with pytest.raises(ValueError, match="--on-bad-sample record"):
        extend_samples(config)
    seal = extend_samples(dataclasses.replace(config, on_bad_sample="record", device="cpu"))
    assert seal.num_samples == 11
    assert [rejected.source_id for rejected in seal.rejected] == ["tiny-711"]


def test_samples_that_kill_the_worker_that_extends_them_are_named(
    tmp_path: Path, llava: Path
) -> None:
    base = built(tmp_path, llava, "topk")
    config = extension(base, tmp_path / "more", llava, settings=RecordSettings(records="hidden"))
    extender = RecordExtender(config)
    extender.prepare()
    extender.probe(1, 0, 2)
    with pytest.raises(ValueError, match=f"samples {CacheReader.open(base).keys[4]} of .* crash"):
        extender.build_shard(1, crashing=[1])


def test_what_records_are_joined_and_computed() -> None:
    assert joined("topk", "hidden") == ("topk+hidden", "hidden")
    assert joined("hidden", "topk") == ("topk+hidden", "topk")
    assert joined("topk", "topk+sketch") == ("topk+sketch", "topk+sketch")
    assert joined("topk", "topk+sketch+hidden") == ("topk+sketch+hidden", "topk+sketch+hidden")
    assert joined("topk+hidden", "topk+sketch") == ("topk+sketch+hidden", "topk+sketch")
    for held in ("topk", "topk+hidden", "topk+sketch+hidden"):
        with pytest.raises(ValueError, match=r"topk adds nothing"):
            joined(held, "topk")


def test_settings_that_would_have_no_effect_are_refused(tmp_path: Path, llava: Path) -> None:
    config: dict[str, Any] = {"cache": "a", "out": "b", "teacher": "c"}
    with pytest.raises(ValueError, match="give either source"):
        ExtendConfig(**config)
    with pytest.raises(ValueError, match="give either source"):
        ExtendConfig(
            **config,
            source="s",
            settings=RecordSettings(records="hidden"),
        )
    with pytest.raises(ValueError, match="limit would have no effect: records is given"):
        ExtendConfig(
            **config,
            limit=4,
            settings=RecordSettings(records="hidden"),
        )
    base = built(tmp_path, llava, "topk")
    idle = extension(
        base, tmp_path / "x", llava, settings=RecordSettings(records="hidden", top_k=4)
    )
    with pytest.raises(ValueError, match="top_k is given, but topk records are not new"):
        extend_records(idle)
    idle = changed(idle, top_k=64, hidden_max_error=0.5)
    with pytest.raises(ValueError, match="hidden_max_error would have no effect"):
        extend_records(idle)


def test_new_records_may_be_lossy(tmp_path: Path, llava: Path) -> None:
    base = built(tmp_path, llava, "topk")
    config = extension(
        base,
        tmp_path / "more",
        llava,
        settings=RecordSettings(records="hidden", hidden_dtype="int8", hidden_group=8),
    )
    extend_records(config)
    more = _sound(tmp_path / "more", llava)
    assert (more.spec.hidden_dtype, more.spec.hidden_group) == ("int8", 8)
    assert more.spec.logits_codec == "exact"
    scales = {name for file in more.seal.shards[0].files[1:] for name in file.columns}
    assert "h_vision_scale" in scales


def test_caches_in_object_stores_are_extended(
    tmp_path: Path, llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMKD_DOWNLOADS", str(tmp_path / "downloads"))
    base = built(tmp_path, llava, "topk")
    place = f"memory://{uuid.uuid4().hex}"
    config = extension(
        base,
        f"{place}/both",
        llava,
        settings=RecordSettings(records="hidden", hidden_dtype="float32"),
    )
    extend_records(config)
    source = build_config(tmp_path, llava, "topk", 12).source.path
    more = extension(f"{place}/both", f"{place}/more", llava, source=source)
    extend_samples(more)
    assert verify_cache(f"{place}/more").problems == ()
    reader = CacheReader.open(f"{place}/more")
    assert (len(reader), reader.spec.records) == (12, "topk+hidden")
    assert [len(commit.files) for commit in reader.seal.shards][:2] == [2, 2]
    at_once = CacheReader.open(built(tmp_path / "once", llava, "topk+hidden", 12))
    assert_same_rows(reader, at_once)
