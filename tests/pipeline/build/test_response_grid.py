"""A cache's grid is the teacher under `compress`, ratio by ratio, and a build like any other."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.build import build as build_module
from pipeline.build.build import CacheBuilder, build
from pipeline.build.response_grid import compression_at, with_grid
from pipeline.build.shard_builder import missing_shards
from pipeline.config.build import BuildConfig
from student_train.compression.compression import compress
from student_train.compression.compressors import COMPRESSORS, Compressor, CompressorInputs
from teacher_cache.encoding.collate import collate
from teacher_cache.folder.reader import CacheReader
from teacher_cache.records.top_k import top_k_from_hidden
from teacher_cache.schema.options import GridSettings, RecordKind, RecordSettings
from teacher_cache.schema.samples import Sample
from teacher_cache.schema.teacher_output import TeacherOutput
from teacher_cache.storage.open_store import open_store
from teacher_cache.teacher.teacher import Teacher
from tests.support.caches import build_cache
from tests.support.changed import changed
from tests.support.deep import deep_model
from tests.support.llava_json import shard_bytes, small_build
from tests.support.paths import TinyFolder
from tests.support.present import present
from tests.support.strategies import assert_same_bits
from tests.support.tiny import tiny_samples

RATIOS = (0.25, 0.5, 0.75)


def grid(compressor: str = "dart", layer: int = 2) -> GridSettings:
    return GridSettings(compressor=compressor, layer=layer, ratios=RATIOS, seed=3)


def deep_teacher(folder: Path, settings: GridSettings) -> Teacher:
    """A teacher of four layers, ready for the grid."""
    return with_grid(Teacher(*deep_model(folder)), settings)


def live(teacher: Teacher, samples: Sequence[Sample], ratio: float, how: GridSettings) -> list[Any]:
    """The states that predict each sample's response, of one whole pass under `compress`."""
    encoded = [teacher.encoder.encode(sample) for sample in samples]
    batch = collate(encoded, teacher.encoder.pad_token_id, "right")
    with compress(teacher.model, compression_at(how, ratio), batch) as found:
        hidden = teacher.hidden_states(batch)
    return [
        hidden[row, found.layout.columns(row, sample.spans.predicting)]
        for row, sample in enumerate(encoded)
    ]


def outputs(reader: CacheReader) -> list[TeacherOutput]:
    return [reader.read(index, reader.parts).output for index in range(len(reader))]


@pytest.mark.parametrize(
    ("family", "compressor"),
    [("llava", "dart"), ("llava_next", "fastv"), ("qwen2_5_vl", "random"), ("qwen2_5_vl", "dart")],
)
def test_each_record_is_the_teacher_under_compression_to_the_bit(
    tmp_path: Path, tiny_folder: TinyFolder, family: str, compressor: str
) -> None:
    how = grid(compressor)
    teacher, samples = deep_teacher(tiny_folder(family), how), tiny_samples(5)
    settings = RecordSettings(
        records="topk+hidden", top_k=teacher.head.vocab_size, hidden_dtype="float32", grid=how
    )
    reader = build_cache(tmp_path, teacher, samples, settings, samples_per_shard=3)
    assert {"response_grid", "hidden_grid"} <= reader.parts
    stored = outputs(reader)
    differs = 0
    for ratio in RATIOS:
        states = [
            *live(teacher, samples[:3], ratio, how),
            *live(teacher, samples[3:], ratio, how),
        ]
        for output, expected in zip(stored, states, strict=True):
            assert_same_bits(present(output.hidden_grid)[ratio], expected)
            record = top_k_from_hidden(expected, teacher.head, teacher.head.vocab_size)
            for name in ("ids", "logits", "logsumexp", "log_tail"):
                assert_same_bits(
                    getattr(present(output.response_grid)[ratio], name), getattr(record, name)
                )
            differs += not torch.equal(present(output.hidden).predicting, expected)
    assert differs >= 4 * len(RATIOS)  # all but the text-only sample, which nothing is dropped of


@pytest.mark.parametrize("compressor", ["dart", "random"])
def test_what_is_kept_of_a_sample_does_not_depend_on_its_batch(
    tiny_folder: TinyFolder, compressor: str
) -> None:
    how = grid(compressor)
    teacher, samples = deep_teacher(tiny_folder("llava_next"), how), tiny_samples(5)
    settings = RecordSettings(records="hidden", hidden_dtype="float32", grid=how)
    together = teacher.outputs(samples, settings)
    for sample, found in zip(samples, together, strict=True):
        (alone,) = teacher.outputs([sample], settings)
        assert isinstance(alone, TeacherOutput)
        assert isinstance(found, TeacherOutput)
        for ratio in RATIOS:
            torch.testing.assert_close(
                present(alone.hidden_grid)[ratio], present(found.hidden_grid)[ratio]
            )


def test_top_k_records_are_those_of_the_whole_vocabulary_cut(tmp_path: Path, llava: Path) -> None:
    teacher, samples = deep_teacher(llava, grid()), tiny_samples(4)
    kept = {}
    for top_k in (7, teacher.head.vocab_size):
        settings = RecordSettings(records="topk", top_k=top_k, grid=grid())
        kept[top_k] = outputs(build_cache(tmp_path / str(top_k), teacher, samples, settings))
    for short, long in zip(*kept.values(), strict=True):
        for ratio in RATIOS:
            cut, whole = present(short.response_grid)[ratio], present(long.response_grid)[ratio]
            assert_same_bits(cut.ids, whole.ids[:, :7])
            assert_same_bits(cut.logits, whole.logits[:, :7])
            assert_same_bits(cut.logsumexp, whole.logsumexp)


def test_where_nothing_is_dropped_the_grid_is_the_ordinary_record(
    tmp_path: Path, tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep_all(inputs: CompressorInputs, _ratio: float) -> Tensor:
        return inputs.vision

    everything = Compressor(name="all", needs=frozenset(), keep=keep_all)
    monkeypatch.setitem(COMPRESSORS, "all", everything)
    teacher = deep_teacher(tiny_folder("llava_next"), grid("all"))
    settings = RecordSettings(records="topk+hidden", top_k=9, grid=grid("all"))
    for output in outputs(build_cache(tmp_path, teacher, tiny_samples(5), settings)):
        for ratio in RATIOS:
            assert_same_bits(
                present(output.response_grid)[ratio].logits, present(output.response).logits
            )
            assert_same_bits(present(output.hidden_grid)[ratio], present(output.hidden).predicting)


@pytest.fixture
def config(tmp_path: Path, llava: Path) -> BuildConfig:
    grid = GridSettings(compressor="random", ratios=RATIOS, layer=1)
    settings = RecordSettings(records="topk", top_k=8, grid=grid)
    return small_build(tmp_path, tiny_samples(8), llava, settings)


@pytest.mark.parametrize("records", ["topk", "hidden"])
@pytest.mark.parametrize("form", ["arrow", "webdataset"])
def test_shards_that_are_built_later_by_another_process_have_the_same_bytes(
    config: BuildConfig, form: str, records: RecordKind
) -> None:
    top_k = 64 if records == "hidden" else 8
    config = changed(config, format=form, records=records, top_k=top_k)
    other = dataclasses.replace(config, out=f"{config.out}-other")
    seal = build(config)
    CacheBuilder(other).prepare()
    for index in reversed(missing_shards(open_store(other.out))):
        CacheBuilder(other).build_shard(index)
    assert build(other).fingerprint == seal.fingerprint
    assert shard_bytes(config.out) == shard_bytes(other.out)
    assert seal.spec.grid == config.settings.grid


def _gridded(config: BuildConfig, **changes: Any) -> BuildConfig:
    return config.with_settings(grid=dataclasses.replace(present(config.settings.grid), **changes))


def test_a_grid_is_part_of_what_a_cache_is_and_none_changes_nothing(config: BuildConfig) -> None:
    plain = changed(config, out=f"{config.out}-plain", grid=None)
    gridded, ordinary = build(config), build(plain)
    assert '"grid"' not in (Path(plain.out) / "plan.json").read_text()
    assert gridded.fingerprint != ordinary.fingerprint
    one, two = CacheReader.open(config.out), CacheReader.open(plain.out)
    assert one.parts - two.parts == {"response_grid"}
    for left, right in zip(outputs(one), outputs(two), strict=True):
        assert_same_bits(present(left.response).logits, present(right.response).logits)
    with pytest.raises(ValueError, match=r"grid\.seed"):
        build(_gridded(config, seed=1))
    with pytest.raises(ValueError, match="grid: stored None"):
        build(dataclasses.replace(config, out=plain.out))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": (0.5, 0.25)}, "expected ascending"),
        ({"ratios": (0.25, 0.25)}, "ascending and distinct"),
        ({"ratios": (0.0, 0.25)}, "ratio 0 is always stored"),
        ({"ratios": (0.5, 1.0)}, "between 0 and 1"),
        ({"ratios": (float("nan"),)}, "between 0 and 1"),
        ({"ratios": tuple(n / 20 for n in range(1, 12))}, "found 11 ratios, expected 1 to 9"),
        ({"layer": 0}, "the layer before it decides"),
        ({"ratios": ()}, "found 0 ratios"),
        ({"compressor": "dart", "seed": 1}, "the compressor dart draws no random numbers"),
        ({"text": "released"}, "the compressor random uses no text"),
    ],
)
def test_settings_that_make_no_grid_are_refused_at_once(
    config: BuildConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _gridded(config, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compressor": "pyramid"}, "compressor is 'pyramid', expected one of dart, fastv, random"),
        ({"layer": 2}, "no layer after the last would see the drop"),
        ({"layer": 7}, "choose 1 to 1"),
    ],
)
def test_a_grid_that_the_teacher_cannot_give_is_refused_before_a_sample_is_read(
    config: BuildConfig, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "scan", None)  # would be called first
    with pytest.raises(ValueError, match=message):
        build(_gridded(config, **changes))
    assert not list(Path(config.out).rglob("*.json"))


def test_a_decoder_that_cannot_drop_tokens_is_refused(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student_train.compression.decoder.DECODERS", ("llama",))
    with pytest.raises(ValueError, match="is a qwen2; tokens can be dropped inside llama only"):
        build(config)
    assert not Path(config.out).exists() or not list(Path(config.out).rglob("*.json"))


def test_a_teacher_without_passes_says_so(llava: Path) -> None:
    teacher = Teacher.load(str(llava), device="cpu")
    with pytest.raises(ValueError, match="set grid_passes first"):
        teacher.outputs(tiny_samples(1), RecordSettings(records="topk", grid=grid()))
