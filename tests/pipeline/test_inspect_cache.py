"""Promises of pipeline/inspect_cache.py: what is shown is what is stored, checked and in words."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.inspect_cache import describe_cache, describe_sample, render
from teacher_cache.folder import SEAL_FILE
from teacher_cache.manifest import IncompleteCacheError, ShardCorruptError
from teacher_cache.reader import CacheReader
from teacher_cache.settings import RecordKind
from tests.builders import build
from tests.strategies import make_cached, make_spec

TIERS: tuple[RecordKind, ...] = ("topk", "topk+sketch", "hidden")


def _cache(folder: Path, records: RecordKind = "topk") -> Path:
    shards = [[make_cached(number, records) for number in part] for part in ((0, 1), (2, 3))]
    build(folder, shards, spec=make_spec(records))
    return folder


@pytest.mark.parametrize("records", TIERS)
def test_a_cache_is_described_by_its_seal(tmp_path: Path, records: RecordKind) -> None:
    reader = CacheReader.open(_cache(tmp_path, records))
    shown = json.loads(json.dumps(describe_cache(tmp_path)))
    assert shown["fingerprint"] == reader.fingerprint
    assert (shown["samples"], shown["shards"]) == (4, 2)
    assert shown["bytes"] == sum(file.stat().st_size for file in (tmp_path / "shards").iterdir())
    outputs = [reader.read(index, reader.parts).output for index in range(len(reader))]
    num_vision = sum(view.num_tokens for output in outputs for view in output.views)
    assert shown["vision_tokens"] == num_vision
    assert shown["response_tokens"] == sum(int(output.is_response.sum()) for output in outputs)
    assert shown["bytes_per_vision_token"] == round(shown["bytes"] / num_vision, 1)
    assert shown["spec"]["records"] == records
    assert shown["rejected"] == []


@pytest.mark.parametrize("records", TIERS)
def test_a_sample_shows_every_record_of_its_tier_and_no_other(
    tmp_path: Path, records: RecordKind
) -> None:
    _cache(tmp_path, records)
    cached = make_cached(1, records)
    shown = json.loads(json.dumps(describe_sample(tmp_path, cached.sample.key)))
    output = cached.output
    assert (shown["key"], shown["index"]) == (cached.sample.key, 1)
    assert shown["messages"] == [f"{m.role}: {m.text}" for m in cached.sample.messages]
    assert shown["image_bytes"] == [len(image) for image in cached.sample.images]
    assert len(shown["views"]) == len(output.views)
    for line, view in zip(shown["views"], output.views, strict=True):
        assert line == (
            f"image {view.image} view {view.view}: {view.rows} x {view.cols} vision tokens"
        )
    assert shown["content_tokens"] == len(output.content_ids)
    assert shown["response_tokens"] == int(output.is_response.sum())
    names = {"vision_top_k", "response_top_k", "affinity", "sketch", "hidden"} & shown.keys()
    top_k = {"vision_top_k", "response_top_k", "affinity"}
    assert (
        names == {"topk": top_k, "topk+sketch": {*top_k, "sketch"}, "hidden": {"hidden"}}[records]
    )


def test_numbers_of_a_record_are_those_that_are_stored(tmp_path: Path) -> None:
    _cache(tmp_path, "topk+sketch")
    cached = make_cached(2, "topk+sketch")
    shown = describe_sample(tmp_path, cached.sample.key)
    vision, affinity = cached.output.vision, cached.output.affinity
    assert vision is not None
    assert affinity is not None
    found: dict[str, Any] = shown["vision_top_k"]
    assert (found["positions"], found["k"]) == tuple(vision.ids.shape)
    assert found["first_position_ids"] == vision.ids[0, :8].tolist()
    tails = sorted(math.exp(value) for value in vision.log_tail.tolist())
    assert found["tail_mass"]["largest"] == round(tails[-1], 5)
    assert tails[0] - 1e-5 <= found["tail_mass"]["median"] <= tails[-1] + 1e-5
    text, tokens = affinity.cosine.shape
    assert (shown["affinity"]["text_tokens"], shown["affinity"]["vision_tokens"]) == (text, tokens)
    values = [float(value) for value in affinity.cosine.flatten()]
    assert shown["affinity"]["range"] == [round(min(values), 4), round(max(values), 4)]


def test_the_beginning_of_a_key_is_enough_if_it_names_one_sample(tmp_path: Path) -> None:
    keys = CacheReader.open(_cache(tmp_path)).keys
    assert describe_sample(tmp_path, keys[3][:12])["key"] == keys[3]
    with pytest.raises(ValueError, match="4 samples have a key that begins with ''") as caught:
        describe_sample(tmp_path, "")
    assert all(key in str(caught.value) for key in keys)
    with pytest.raises(ValueError, match=f"0 samples have .*first keys are: {keys[0]}"):
        describe_sample(tmp_path, "nothing")


def test_what_is_rendered_reads_back_as_yaml(tmp_path: Path) -> None:
    _cache(tmp_path)
    for shown in (describe_cache(tmp_path), describe_sample(tmp_path, make_cached(0).sample.key)):
        text = render(shown)
        assert yaml.safe_load(text) == json.loads(json.dumps(shown))
        assert list(yaml.safe_load(text)) == list(shown)  # in the order of the description


def test_damage_and_unfinished_caches_are_refused_not_shown(tmp_path: Path) -> None:
    cache = _cache(tmp_path / "cache")
    half = Path(shutil.copytree(cache, tmp_path / "half"))
    (half / SEAL_FILE).unlink()
    with pytest.raises(IncompleteCacheError):
        describe_cache(half)
    sample = make_cached(1).sample
    file = sorted((cache / "shards").iterdir())[0]
    data = bytearray(file.read_bytes())
    data[data.index(sample.images[0]) + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ShardCorruptError, match=rf"{file.name}.*{sample.key}"):
        describe_sample(cache, sample.key)
