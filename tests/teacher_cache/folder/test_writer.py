"""A cache is whole or refused: zombies, other plans, rows that were not planned."""

import dataclasses
from pathlib import Path

import pytest
import torch

from teacher_cache.folder.layout import committed, read_plan, read_seal
from teacher_cache.folder.writer import seal_cache, write_assets, write_plan, write_shard
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.lm_head import LmHead
from teacher_cache.schema.errors import CacheMismatchError, IncompleteCacheError, ShardCorruptError
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.schema.samples import RejectedSample
from teacher_cache.storage.local_store import LocalStore
from tests.support.builders import build, make_shards, published
from tests.support.strategies import make_cached, make_output, make_plan, make_spec

FORMATS: tuple[ShardFormatName, ...] = ("arrow", "webdataset")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_a_build_holds_only_what_the_seal_names(tmp_path: Path, form: ShardFormatName) -> None:
    seal = build(tmp_path, make_shards(), form)
    records = {f"commits/{index:05d}.json" for index in range(3)}
    shards = {file.file for commit in seal.shards for file in commit.files}
    assert set(published(tmp_path)) == {"plan.json", "SEALED.json"} | records | shards
    assert all(f.sha256[:16] in f.file for commit in seal.shards for f in commit.files)
    assert seal.num_samples == 6
    assert seal.num_bytes == sum(len(published(tmp_path)[name]) for name in shards)
    assert [commit.num_vision_tokens for commit in seal.shards] == [8, 8, 8]


def test_building_again_changes_nothing(tmp_path: Path) -> None:
    first = build(tmp_path, make_shards())
    before = published(tmp_path)
    assert build(tmp_path, make_shards()) == first
    assert published(tmp_path) == before


def test_both_formats_have_one_fingerprint(tmp_path: Path) -> None:
    seals = [build(tmp_path / form, make_shards(), form) for form in FORMATS]
    assert seals[0].fingerprint == seals[1].fingerprint


def test_a_zombie_attempt_loses_to_the_committed_one(tmp_path: Path, store: LocalStore) -> None:
    shards = make_shards(1)
    plan = write_plan(store, make_plan(shards))
    first = write_shard(store, plan, 0, shards[0], [], 1.0)
    before = published(tmp_path)
    # The zombie wakes up with the same numbers, then another one with others.
    other = [dataclasses.replace(row, output=make_output("topk", 99)) for row in shards[0]]
    assert write_shard(store, plan, 0, shards[0], [], 3.0) == first
    assert published(tmp_path) == before
    assert write_shard(store, plan, 0, other, [], 2.0) == first
    (unreferenced,) = published(tmp_path).keys() - before.keys()
    seal = seal_cache(store)
    assert unreferenced not in {file.file for commit in seal.shards for file in commit.files}


def test_an_unfinished_cache_cannot_be_sealed(store: LocalStore) -> None:
    with pytest.raises(IncompleteCacheError, match=r"no plan\.json"):
        seal_cache(store)
    shards = make_shards()
    plan = write_plan(store, make_plan(shards))
    write_shard(store, plan, 1, shards[1], [], 0.0)
    with pytest.raises(IncompleteCacheError, match=r"1 of 3 shards.*\[0, 2\].*emkd command again"):
        seal_cache(store)
    assert read_seal(store) is None


def test_another_spec_is_refused_by_the_names_of_its_fields(store: LocalStore) -> None:
    shards = make_shards()
    write_plan(store, make_plan(shards))
    other = make_plan(shards, make_spec(top_k=7, attention="eager"))
    with pytest.raises(CacheMismatchError) as caught:
        write_plan(store, other)
    assert "spec.top_k: stored 4, wanted 7" in str(caught.value)
    assert "spec.attention: stored 'sdpa', wanted 'eager'" in str(caught.value)
    assert "tokenizer" not in str(caught.value)
    assert read_plan(store) == make_plan(shards)


def test_other_samples_and_another_format_are_refused(store: LocalStore) -> None:
    write_plan(store, make_plan(make_shards()))
    with pytest.raises(CacheMismatchError, match="shards"):
        write_plan(store, make_plan(make_shards(4)))
    with pytest.raises(CacheMismatchError, match="format: stored 'arrow', wanted 'webdataset'"):
        write_plan(store, make_plan(make_shards(), form="webdataset"))


def test_a_plan_names_each_sample_once(store: LocalStore) -> None:
    with pytest.raises(ValueError, match="each key once"):
        write_plan(store, make_plan([[make_cached(1)], [make_cached(1)]]))


def test_rows_must_be_those_of_the_plan_in_its_order(store: LocalStore) -> None:
    shards = make_shards(1)
    plan = write_plan(store, make_plan(shards))
    rejected = [RejectedSample(key=make_cached(9).sample.key, source_id="9", reason="odd")]
    for rows in (shards[0][::-1], shards[0][:1], [*shards[0], make_cached(9)], []):
        with pytest.raises(ValueError, match="samples of the plan"):
            write_shard(store, plan, 0, rows, [], 0.0)
    with pytest.raises(ValueError, match="samples of the plan"):
        write_shard(store, plan, 0, shards[0], rejected, 0.0)
    assert committed(store) == {}


def test_records_of_another_tier_or_vocabulary_are_refused(
    tmp_path: Path, store: LocalStore
) -> None:
    shards = make_shards(1)
    hidden = make_plan(shards, make_spec("hidden"))
    with pytest.raises(ValueError, match=r"teacher gave \['affinity', 'response', 'vision'\]"):
        write_shard(store, hidden, 0, shards[0], [], 0.0)
    with pytest.raises(ValueError, match="over 11 vocabulary rows, the cache is over 12"):
        write_shard(store, make_plan(shards, make_spec(vocab_size=12)), 0, shards[0], [], 0.0)
    assert published(tmp_path) == {}
    assert list((tmp_path / "shards").iterdir()) == []


def test_rejected_samples_are_listed_and_counted(store: LocalStore) -> None:
    shards = make_shards(2)
    plan = write_plan(store, make_plan(shards))
    lost = shards[1][0].sample
    rejected = RejectedSample(key=lost.key, source_id=lost.source_id, reason="too long")
    write_shard(store, plan, 0, shards[0], [], 0.0)
    write_shard(store, plan, 1, shards[1][1:], [rejected], 0.0)
    seal = seal_cache(store)
    assert (seal.num_samples, seal.rejected) == (3, (rejected,))


def test_a_cache_without_a_single_sample_is_refused(store: LocalStore) -> None:
    (row,) = (make_cached(1),)
    plan = write_plan(store, make_plan([[row]]))
    reason = RejectedSample(key=row.sample.key, source_id="sample-1", reason="odd")
    write_shard(store, plan, 0, [], [reason], 0.0)
    with pytest.raises(ValueError, match="every sample was rejected"):
        seal_cache(store)


def test_sealing_refuses_files_that_are_not_the_committed_ones(
    tmp_path: Path, store: LocalStore
) -> None:
    shards = make_shards(2)
    plan = write_plan(store, make_plan(shards))
    files = [
        tmp_path / write_shard(store, plan, index, rows, [], 0.0).files[0].file
        for index, rows in enumerate(shards)
    ]
    first, second = (file.read_bytes() for file in files)
    for content in (second, first[:-1], None):
        files[0].unlink() if content is None else files[0].write_bytes(content)
        with pytest.raises(ShardCorruptError, match=files[0].name):
            seal_cache(store)
    files[0].write_bytes(first)
    seal_cache(store)


def test_shards_that_were_not_planned_are_refused(tmp_path: Path, store: LocalStore) -> None:
    shards = make_shards()
    build(tmp_path / "larger", shards)
    plan = write_plan(store, make_plan(shards[:2]))
    for index in (0, 1):
        write_shard(store, plan, index, shards[index], [], 0.0)
    record = tmp_path / "commits" / "00002.json"
    record.write_bytes((tmp_path / "larger" / "commits" / record.name).read_bytes())
    with pytest.raises(CacheMismatchError, match=r"shards \[2\] are committed, the plan has 2"):
        seal_cache(store)


def test_assets_must_be_those_of_the_spec(tmp_path: Path, store: LocalStore) -> None:
    head = LmHead(weight=torch.arange(6.0).reshape(2, 3))
    write_plan(store, make_plan(make_shards(1), make_spec("hidden", head_digest=head.digest)))
    other = LmHead(weight=torch.zeros(2, 3))
    for wrong in (None, other):
        with pytest.raises(CacheMismatchError, match="head"):
            write_assets(store, TeacherAssets(head=wrong))
    write_assets(store, TeacherAssets(head=head))
    before = published(tmp_path)
    write_assets(store, TeacherAssets(head=head))
    assert published(tmp_path) == before
