"""Any sample, any part, from any thread or process; anything doubtful is refused by name."""

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from teacher_cache.codec.columns import Part, parts_in
from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.writer import write_plan, write_shard
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import SketchBasis
from teacher_cache.schema.errors import (
    CacheMismatchError,
    DecodeError,
    IncompleteCacheError,
    ShardCorruptError,
)
from teacher_cache.schema.manifest import LAYOUT_VERSION
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.storage.local_store import LocalStore
from tests.support.builders import build, edit_record, flip, make_shards
from tests.support.strategies import assert_same, make_cached, make_plan, make_spec

FORMATS: tuple[ShardFormatName, ...] = ("arrow", "webdataset")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.fixture(params=FORMATS)
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small sealed cache in each format."""
    build(tmp_path, make_shards(), request.param)
    return tmp_path


def test_every_sample_comes_back_in_the_order_of_the_plan(cache: Path) -> None:
    reader = CacheReader.open(cache)
    rows = [row for shard in make_shards() for row in shard]
    assert reader.shard_sizes == (2, 2, 2)
    assert reader.keys == tuple(row.sample.key for row in rows)
    assert reader.fingerprint == reader.seal.fingerprint
    for index, row in enumerate(rows):
        assert_same(reader.read(index, reader.parts), row)
        assert reader.find(row.sample.key) == index


def test_parts_not_asked_for_are_none(cache: Path) -> None:
    reader = CacheReader.open(cache)
    asked: list[frozenset[Part]] = [frozenset(), frozenset({"vision"}), reader.parts]
    for parts in asked:
        assert parts_in(reader.read(3, parts).output) == parts


def test_parts_that_the_cache_does_not_hold_are_refused(cache: Path) -> None:
    with pytest.raises(ValueError, match="asked for hidden, sketch"):
        CacheReader.open(cache).read(0, {"vision", "sketch", "hidden"})


def test_samples_that_are_not_there_are_refused(cache: Path) -> None:
    reader = CacheReader.open(cache)
    for index in (-1, 6):
        with pytest.raises(IndexError, match="of 6"):
            reader.read(index, ())
    with pytest.raises(ValueError, match="has no sample 'abc'"):
        reader.find("abc")


def test_threads_and_copies_in_other_processes_read_the_same(cache: Path) -> None:
    reader = CacheReader.open(cache)
    copy: CacheReader = pickle.loads(pickle.dumps(reader))
    with ThreadPoolExecutor(4) as pool:
        indices = [n % 6 for n in range(48)]
        for index, read in zip(
            indices, pool.map(lambda n: copy.read(n, copy.parts), indices), strict=True
        ):
            assert_same(read, reader.read(index, reader.parts))


def test_more_shards_than_stay_open_are_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teacher_cache.folder.reader._MAX_OPEN_SHARDS", 1)
    build(tmp_path, make_shards())
    reader = CacheReader.open(tmp_path)
    for index in (0, 5, 1, 4, 2, 3):
        assert reader.read(index, ()).sample == make_cached(index).sample


def test_a_half_built_cache_is_refused_with_the_remedy(tmp_path: Path, store: LocalStore) -> None:
    shards = make_shards()
    plan = write_plan(store, make_plan(shards))
    for index in (0, 2):
        write_shard(store, plan, index, shards[index], [], 0.0)
    with pytest.raises(IncompleteCacheError, match=r"2 of 3 shards.*the same emkd command again"):
        CacheReader.open(tmp_path)


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCacheError, match="is not a cache"):
        CacheReader.open(tmp_path / "nowhere")


def test_another_layout_is_refused(tmp_path: Path) -> None:
    build(tmp_path, make_shards(), spec=make_spec(layout_version=LAYOUT_VERSION + 1))
    with pytest.raises(CacheMismatchError, match=f"layout {LAYOUT_VERSION + 1}"):
        CacheReader.open(tmp_path)


Damage = Callable[[Path], None]


def _edit(name: str, old: str, new: str) -> Damage:
    return lambda cache: edit_record(cache / name, old, new)


def _other_plan(cache: Path) -> None:
    first, second = (make_cached(number).sample.key for number in (0, 5))
    edit_record(cache / "plan.json", first, "other")
    edit_record(cache / "plan.json", second, first)
    edit_record(cache / "plan.json", "other", second)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_edit("SEALED.json", '"top_k": 4', '"top_k": 5'), CacheMismatchError, "top_k"),
        (_edit("plan.json", '"top_k": 4', '"top_k": 5'), CacheMismatchError, "top_k"),
        (_edit("SEALED.json", '"num_rows": 2', '"num_rows": 3'), CacheMismatchError, "rows"),
        (_edit("SEALED.json", '"index": 2', '"index": 1'), CacheMismatchError, "shards"),
        (_edit("SEALED.json", '"arrow"', '"webdataset"'), CacheMismatchError, "format"),
        (_edit("SEALED.json", "shards/", "../"), ShardCorruptError, "expected shards"),
        (_edit("SEALED.json", '"source"', '"sauce"'), DecodeError, "did you mean 'source'"),
        (_other_plan, CacheMismatchError, "plan"),
    ],
    ids=["spec", "plan-spec", "rows", "index", "format", "path", "field", "keys"],
)
def test_seal_and_plan_that_disagree_are_refused(
    tmp_path: Path, damage: Damage, error: type[Exception], message: str
) -> None:
    build(tmp_path, make_shards())
    damage(tmp_path)
    with pytest.raises(error, match=message):
        CacheReader.open(tmp_path)


def test_missing_and_cut_shards_are_refused_at_once(cache: Path) -> None:
    file = sorted((cache / "shards").iterdir())[1]
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ShardCorruptError, match=rf"{file.name}.*found {len(content) - 1} bytes"):
        CacheReader.open(cache)
    file.unlink()
    with pytest.raises(ShardCorruptError, match=rf"{file.name} is missing"):
        CacheReader.open(cache)


def test_a_shard_of_another_place_or_cache_is_refused(tmp_path: Path) -> None:
    seal = build(tmp_path / "a", make_shards())
    build(tmp_path / "b", make_shards(), spec=make_spec(attention="eager"))
    num_bytes = seal.shards[0].num_bytes
    first, second, _ = sorted((tmp_path / "a" / "shards").iterdir())
    foreign, *_ = sorted((tmp_path / "b" / "shards").iterdir())
    for other, field in ((second, "emkd.shard"), (foreign, "emkd.cache")):
        content = other.read_bytes()
        first.write_bytes(content)
        sizes = (f'"num_bytes": {num_bytes}', f'"num_bytes": {len(content)}')
        edit_record(tmp_path / "a" / "SEALED.json", *sizes, count=1)
        num_bytes = len(content)
        with pytest.raises(ShardCorruptError, match=rf"{first.name}.*{field}"):
            CacheReader.open(tmp_path / "a").read(0, ())


def test_a_damaged_row_names_file_and_sample_and_spares_the_others(cache: Path) -> None:
    row = make_cached(1)
    file = sorted((cache / "shards").iterdir())[0]
    flip(file, row.sample.images[0])
    reader = CacheReader.open(cache)
    with pytest.raises(ShardCorruptError, match=rf"{file.name}.*{row.sample.key}.*images"):
        reader.read(1, ())
    assert_same(reader.read(0, reader.parts), make_cached(0))


def test_assets_come_back_and_are_checked(tmp_path: Path) -> None:
    head = LmHead(weight=torch.randn(11, 6), bias=torch.randn(11))
    basis = SketchBasis(
        hidden_mean=torch.randn(6),
        projection=torch.randn(6, 3),
        mean_logits=torch.randn(11),
        directions=torch.randn(11, 3).half(),
    )
    spec = make_spec(head_digest=head.digest, sketch_digest=basis.digest)
    build(tmp_path, make_shards(), spec=spec, head=head, sketch=basis)
    reader = CacheReader.open(tmp_path)
    assert reader.head().digest == head.digest
    assert reader.sketch_basis().digest == basis.digest
    for name, read in (("head", reader.head), ("sketch", reader.sketch_basis)):
        file = tmp_path / f"{name}.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        for content in (bytes(data), data[:40]):
            file.write_bytes(content)
            with pytest.raises(ShardCorruptError, match=file.name):
                read()


def test_a_tier_without_assets_says_so(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"no head\.safetensors"):
        CacheReader.open(cache).head()
