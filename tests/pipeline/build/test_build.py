"""Promises of build/build.py: same bytes whatever happens, and refusal that names the cause."""

import dataclasses
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.build.build import CacheBuilder, build
from pipeline.build.shard_builder import missing_shards
from pipeline.config.build import BuildConfig
from teacher_cache.codec.error_bounds import CodecError
from teacher_cache.folder.layout import read_seal
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.errors import CacheMismatchError, IncompleteCacheError
from teacher_cache.schema.options import RecordSettings
from teacher_cache.schema.samples import Sample
from teacher_cache.storage.open_store import open_store
from teacher_cache.teacher.teacher import Teacher
from tests.support.changed import changed
from tests.support.children import start
from tests.support.llava_json import shard_bytes, small_build, write_llava_json
from tests.support.paths import TinyFolder
from tests.support.tiny import tiny_samples


@pytest.fixture
def config(tmp_path: Path, llava: Path) -> BuildConfig:
    return small_build(tmp_path, tiny_samples(10), llava, RecordSettings(top_k=8))


def _into(config: BuildConfig, folder: str, **changes: object) -> BuildConfig:
    out = str(Path(config.out).parent / folder)
    return changed(config, out=out, **changes)


HIDDEN: dict[str, object] = {"records": "hidden", "top_k": 64}
"""Changes of a configuration to records that have no top k."""


@pytest.mark.parametrize("changes", [{"records": "topk"}, {"records": "topk+sketch"}, HIDDEN])
@pytest.mark.parametrize("form", ["arrow", "webdataset"])
def test_building_twice_gives_the_same_bytes(
    config: BuildConfig, changes: dict[str, object], form: str
) -> None:
    first = build(_into(config, "a", format=form, **changes))
    second = build(_into(config, "b", format=form, **changes))
    assert first.num_samples == 10
    assert shard_bytes(Path(config.out).parent / "a") == shard_bytes(Path(config.out).parent / "b")
    assert first.fingerprint == second.fingerprint


def test_the_format_does_not_change_the_identity(config: BuildConfig) -> None:
    arrow = build(_into(config, "a", format="arrow"))
    tar = build(_into(config, "b", format="webdataset"))
    assert arrow.fingerprint == tar.fingerprint


def test_every_sample_is_there_under_its_content_key(config: BuildConfig) -> None:
    build(config)
    reader = CacheReader.open(config.out)
    assert sorted(reader.keys) == sorted(sample.key for sample in tiny_samples(10))
    for index, key in enumerate(reader.keys):
        assert reader.read(index, ["vision", "response"]).sample.key == key


def test_shards_may_be_built_in_any_order_by_anyone(config: BuildConfig) -> None:
    build(_into(config, "a"))
    other = _into(config, "b")
    CacheBuilder(other).prepare()
    order = missing_shards(open_store(other.out))
    random.Random(0).shuffle(order)
    for index in order:
        CacheBuilder(other).build_shard(index)
    build(other)
    assert shard_bytes(Path(config.out).parent / "a") == shard_bytes(other.out)


def test_a_finished_cache_never_loads_the_teacher(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = build(config)

    def refuse(*_: object, **__: object) -> Teacher:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(Teacher, "load", refuse)
    assert build(config) == seal
    with pytest.raises(AssertionError, match="the teacher was loaded"):
        build(_into(config, "other"))  # the test can fail


def test_a_half_built_cache_is_not_opened(config: BuildConfig) -> None:
    builder = CacheBuilder(config)
    builder.prepare()
    builder.build_shard(1)
    with pytest.raises(IncompleteCacheError, match="1 of 4 shards"):
        CacheReader.open(config.out)
    build(config)
    assert len(CacheReader.open(config.out)) == 10


@pytest.mark.parametrize("finish", [False, True])
def test_another_teacher_is_refused(
    config: BuildConfig, tiny_folder: TinyFolder, tmp_path: Path, finish: bool
) -> None:
    from tests.support.tiny import tiny_llava

    builder = CacheBuilder(config)
    builder.prepare()
    builder.build_shard(0)
    if finish:
        build(config)
    before = shard_bytes(config.out)
    other = tiny_llava(tmp_path / "other", seed=1)
    with pytest.raises(CacheMismatchError, match="teacher_weights"):
        build(dataclasses.replace(config, teacher=str(other)))
    assert shard_bytes(config.out) == before


@pytest.mark.parametrize(
    ("field", "value"), [("top_k", 9), ("records", "topk"), ("affinity_dtype", "float32")]
)
def test_other_settings_are_refused_by_field(
    config: BuildConfig, field: str, value: object
) -> None:
    build(config)
    with pytest.raises(CacheMismatchError, match=field):
        build(changed(config, **{field: value}))


def test_other_samples_are_refused(config: BuildConfig, tmp_path: Path) -> None:
    build(config)
    write_llava_json(tmp_path / "data", tiny_samples(9))
    with pytest.raises(CacheMismatchError, match="shards"):
        build(config)


def test_a_sample_that_changes_during_the_build_is_refused(
    config: BuildConfig, tmp_path: Path
) -> None:
    builder = CacheBuilder(config)
    builder.prepare()
    write_llava_json(tmp_path / "data", tiny_samples(10, seed=3))
    with pytest.raises(ValueError, match="has changed since the plan was made"):
        CacheBuilder(config).build_shard(2)


def test_top_k_beyond_the_vocabulary_publishes_nothing(config: BuildConfig) -> None:
    with pytest.raises(ValueError, match="top_k is 100000"):
        build(changed(config, top_k=100_000))
    assert not Path(config.out).exists() or not list(Path(config.out).iterdir())


def test_the_sketch_is_fitted_to_images_from_all_over_the_source(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    fit = Teacher.calibrate

    def watch(self: Teacher, batches: Iterable[Sequence[Sample]], *more: Any) -> None:
        def noted() -> Iterator[Sequence[Sample]]:
            for batch in batches:
                seen.append([sample.source_id for sample in batch])
                yield batch

        fit(self, noted(), *more)

    monkeypatch.setattr(Teacher, "calibrate", watch)
    few = build(_into(config, "few", calibration_tokens=50))
    assert seen == [["tiny-0", "tiny-8"], ["tiny-4", "tiny-6"]]  # 48 tokens, 32
    seen.clear()
    everything = build(config)
    wanted = ["tiny-0", "tiny-8", "tiny-4", "tiny-6", "tiny-1", "tiny-9", "tiny-5", "tiny-3"]
    assert [name for batch in seen for name in batch] == wanted  # the other two show nothing
    assert few.spec.sketch_digest != everything.spec.sketch_digest


def _spoil(config: BuildConfig, how: str) -> str:
    """Damage one sample of the source; returns its id."""
    samples = tiny_samples(10)
    victim = samples[5]
    folder = Path(config.source.path).parent
    image = folder / f"{victim.source_id}-0.png"
    if how == "missing image":
        image.unlink()
    elif how == "corrupt image":
        image.write_bytes(b"\x89PNG nothing of the kind")
    else:
        text = Path(config.source.path).read_text()
        Path(config.source.path).write_text(text.replace("<image>", "<image> <image>", 1))
        return samples[0].source_id
    return victim.source_id


@pytest.mark.parametrize("how", ["missing image", "corrupt image", "placeholders"])
def test_a_bad_sample_stops_the_build_and_is_named(config: BuildConfig, how: str) -> None:
    victim = _spoil(config, how)
    with pytest.raises(ValueError, match=victim) as caught:
        build(config)
    assert config.source.path in str(caught.value)
    assert "--on-bad-sample record" in str(caught.value)
    assert read_seal(open_store(config.out)) is None


@pytest.mark.parametrize("how", ["missing image", "corrupt image", "placeholders"])
def test_a_bad_sample_can_be_recorded_instead(config: BuildConfig, how: str) -> None:
    victim = _spoil(config, how)
    seal = build(dataclasses.replace(config, on_bad_sample="record"))
    assert seal.num_samples == 9
    assert [rejected.source_id for rejected in seal.rejected] == [victim]
    other = build(_into(config, "other", on_bad_sample="record"))
    assert other.rejected == seal.rejected  # a resumed build compares the plans, reasons included
    assert shard_bytes(config.out) == shard_bytes(Path(config.out).parent / "other")


def test_killed_at_random_moments_it_ends_with_the_same_bytes(config: BuildConfig) -> None:
    undisturbed = build(_into(config, "undisturbed"))
    draws = random.Random(7)
    for kill in range(4):
        child = start(build, config)
        # wait until the attempt has come a little further than the one before, then kill it
        while child.is_alive() and len(list(Path(config.out).glob("commits/*.json"))) <= kill // 2:
            time.sleep(0.002)
        time.sleep(draws.uniform(0, 0.05))
        child.kill()
        child.join()
    seal = build(config)
    assert shard_bytes(config.out) == shard_bytes(Path(config.out).parent / "undisturbed")
    said = [commit.quality for commit in undisturbed.shards]
    assert [commit.quality for commit in seal.shards] == said


def test_shards_that_are_written_are_not_measured_otherwise_in_silence(config: BuildConfig) -> None:
    CacheBuilder(config).prepare()
    CacheBuilder(config).build_shard(0)
    otherwise = dataclasses.replace(config, quality_samples=config.quality_samples + 1)
    with pytest.raises(ValueError, match="on 2 samples of each, found quality_samples 3"):
        build(otherwise)
    build(config)
    with pytest.raises(ValueError, match="continue with 2, or build into a new folder"):
        build(otherwise)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"records": "hidden"}, "top_k would have no effect: records hidden have no topk"),
        ({**HIDDEN, "top_p": 0.9}, "top_p would have no effect: records hidden"),
        ({**HIDDEN, "logits_codec": "affine8"}, "logits_codec would have no effect"),
        ({**HIDDEN, "affinity_dtype": "int8"}, "affinity_dtype would have no effect"),
        ({**HIDDEN, "sketch_rank": 8}, "sketch_rank would have no effect: records hidden have no"),
        ({"records": "topk", "sketch_rank": 8}, "sketch_rank would have no effect: records topk"),
        ({**HIDDEN, "calibration_tokens": 9}, "calibration_tokens would have no effect"),
        ({**HIDDEN, "least_logits": False}, "least_logits would have no effect"),
        ({"hidden_dtype": "int8"}, "hidden_dtype would have no effect"),
        (
            {"hidden_group": 32},
            r"hidden_group would have no effect: records topk\+sketch have no",
        ),
        ({"min_k": 2}, "min_k would have no effect: top_p is not set"),
        ({"logits_max_error": 0.1}, "logits_max_error would have no effect: logits are exact"),
        ({"affinity_max_error": 0.1}, "affinity_max_error would have no effect"),
        ({**HIDDEN, "hidden_max_error": 0.1}, "hidden_max_error would have no effect"),
        ({"top_p": 1.0}, "top_p is 1.0"),
        ({"top_p": 0.9, "min_k": 9}, "min_k is 9, expected 1..top_k, which is 8"),
        ({**HIDDEN, "hidden_dtype": "int8", "hidden_group": 0}, "hidden_group must be"),
    ],
)
def test_settings_of_codecs_without_effect_are_refused(
    config: BuildConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _into(config, "a", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"records": "topk", "top_p": 0.5, "min_k": 2},
        {"logits_codec": "affine8", "affinity_dtype": "int8", "affinity_max_error": 0.004},
        {**HIDDEN, "hidden_dtype": "int8", "hidden_group": 16},
    ],
)
def test_a_lossy_cache_is_built_within_its_bounds_or_not_at_all(
    config: BuildConfig, changes: dict[str, object]
) -> None:
    seal = build(_into(config, "a", **changes))
    assert seal.num_samples == 10
    lossy = {"affinity_dtype": "affinity_max_error", "hidden_dtype": "hidden_max_error"}
    for name in [bound for codec, bound in lossy.items() if codec in changes]:
        with pytest.raises(CodecError, match=f"{name} is 1e-09.*: choose"):
            build(_into(config, name, **{**changes, name: 1e-9}))
