"""Promises of inspection/cache.py: what is shown is what is stored, checked and in words."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml

from pipeline.inspection.cache import describe_cache, render
from pipeline.inspection.sample import describe_sample
from teacher_cache.codec.columns import PART_COLUMNS
from teacher_cache.folder.layout import SEAL_FILE
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.errors import IncompleteCacheError, ShardCorruptError
from teacher_cache.schema.options import RecordKind, ShardFormatName
from teacher_cache.schema.samples import Message, Sample, make_sample
from teacher_cache.schema.teacher_output import CachedSample
from tests.support.builders import build
from tests.support.derived import base_cache, rows_of
from tests.support.strategies import asked_again, make_cached, make_output, make_spec

TIERS: tuple[RecordKind, ...] = ("topk", "topk+sketch", "hidden")


def _cache(folder: Path, records: RecordKind = "topk") -> Path:
    shards = [[make_cached(number, records) for number in part] for part in ((0, 1), (2, 3))]
    build(folder, shards, spec=make_spec(records))
    return folder


@pytest.mark.parametrize("records", TIERS)
def test_a_cache_is_described_by_its_seal(tmp_path: Path, records: RecordKind) -> None:
    reader = CacheReader.open(_cache(tmp_path, records))
    shown = json.loads(json.dumps(describe_cache(CacheReader.open(tmp_path))))
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


def test_a_cache_says_how_many_samples_share_a_vision_record(tmp_path: Path) -> None:
    build(tmp_path / "alone", [[make_cached(0)], [make_cached(1)]])
    shown = describe_cache(CacheReader.open(tmp_path / "alone"))
    assert (shown["vision_records"], shown["samples_per_vision_record"]) == (2, 1.0)
    one, text = make_cached(0), CachedSample(sample=_no_image(), output=make_output("topk", 5, ()))
    shards = [[one, asked_again(one, 1), asked_again(one, 2), text], [make_cached(3)]]
    build(tmp_path / "shared", shards)
    reader = CacheReader.open(tmp_path / "shared")
    shown = describe_cache(reader)
    found = (shown["samples"], shown["samples_with_images"], shown["vision_records"])
    assert (found, shown["samples_per_vision_record"]) == ((5, 4, 2), 2.0)
    stored = [commit.num_stored_vision_tokens for commit in reader.seal.shards]
    assert (shown["vision_tokens"], stored) == (16, [4, 4])


def _no_image() -> Sample:
    turns = (Message(role="user", text="what?"), Message(role="assistant", text="that"))
    return make_sample("text", [], turns)


@pytest.mark.parametrize("form", ["arrow", "webdataset"])
def test_bytes_of_parts_are_those_of_the_frames(tmp_path: Path, form: ShardFormatName) -> None:
    cache = base_cache(tmp_path, form=form)  # some of its rows share their images and vision states
    shown = describe_cache(CacheReader.open(tmp_path))["bytes_of_parts"]
    expected = Counter[str]()
    for row in (row.without_shared for row in rows_of(cache)):
        expected["images"] += sum(len(image) for image in row.images)
        for name, frame in row.frames.items():
            expected["hidden" if name in PART_COLUMNS["hidden"] else "tokens"] += len(frame)
    around = cache.seal.num_bytes - sum(expected.values())
    assert shown == {"shards": 3, **expected, "around": around}
    assert around > 0


def test_tail_masses_are_those_of_the_rows(tmp_path: Path) -> None:
    reader = CacheReader.open(_cache(tmp_path))
    shown = describe_cache(reader)["tail_mass"]
    assert shown["rows"] == 4
    for part in ("vision", "response"):
        records = [getattr(make_cached(number).output, part) for number in range(4)]
        masses = sorted(math.exp(tail) for record in records for tail in record.log_tail.tolist())
        assert shown[part]["100%"] == pytest.approx(masses[-1], rel=1e-3)
        below = sum(mass <= shown[part]["50%"] * 1.001 for mass in masses)
        assert len(masses) / 2 <= below <= len(masses) / 2 + 1


def test_a_bounded_number_of_rows_is_looked_at(tmp_path: Path) -> None:
    reader = CacheReader.open(_cache(tmp_path))
    assert describe_cache(reader, num_rows=2)["tail_mass"]["rows"] == 2
    assert describe_cache(reader, num_rows=2) == describe_cache(reader, num_rows=2)
    assert describe_cache(CacheReader.open(_cache(tmp_path / "h", "hidden")))["tail_mass"] is None


def test_what_is_rendered_reads_back_as_yaml(tmp_path: Path) -> None:
    _cache(tmp_path)
    reader = CacheReader.open(tmp_path)
    for shown in (describe_cache(reader), describe_sample(reader, make_cached(0).sample.key)):
        text = render(shown)
        assert yaml.safe_load(text) == json.loads(json.dumps(shown))
        assert list(yaml.safe_load(text)) == list(shown)  # in the order of the description


def test_damage_and_unfinished_caches_are_refused_not_shown(tmp_path: Path) -> None:
    cache = _cache(tmp_path / "cache")
    half = Path(shutil.copytree(cache, tmp_path / "half"))
    (half / SEAL_FILE).unlink()
    with pytest.raises(IncompleteCacheError):
        CacheReader.open(half)
    sample = make_cached(1).sample
    file = sorted((cache / "shards").iterdir())[0]
    data = bytearray(file.read_bytes())
    data[data.index(sample.images[0]) + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ShardCorruptError, match=rf"{file.name}.*{sample.key}"):
        describe_sample(CacheReader.open(cache), sample.key)
