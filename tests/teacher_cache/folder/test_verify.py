"""Verification finds every kind of damage, and all of it."""

from pathlib import Path

import pytest
import torch

from teacher_cache.folder.verify import verify_cache
from teacher_cache.folder.writer import write_plan
from teacher_cache.records.lm_head import LmHead
from teacher_cache.schema.errors import IncompleteCacheError
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.storage.local_store import LocalStore
from tests.support.builders import build, edit_record, make_shards
from tests.support.strategies import make_plan, make_spec

FORMATS: tuple[ShardFormatName, ...] = ("arrow", "webdataset")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_a_sound_cache_has_no_problems(
    tmp_path: Path, store: LocalStore, form: ShardFormatName
) -> None:
    build(tmp_path, make_shards(), form)
    seen: list[tuple[int, int]] = []
    report = verify_cache(store, lambda _what, done, total: seen.append((done, total)))
    assert (report.shards, report.samples, report.problems) == (3, 6, ())
    assert seen == [(done, 6) for done in range(1, 7)]


def test_all_problems_are_listed(tmp_path: Path, store: LocalStore) -> None:
    head = LmHead(weight=torch.ones(11, 6))
    spec = make_spec(head_digest=head.digest)
    seal = build(tmp_path, make_shards(), spec=spec, head=head)
    cut, missing, _ = (tmp_path / commit.files[0].file for commit in seal.shards)
    cut.write_bytes(cut.read_bytes()[:-1])
    missing.unlink()
    (tmp_path / "head.safetensors").unlink()
    record = tmp_path / "commits" / "00002.json"
    edit_record(record, '"seconds": 0.0', '"seconds": 1.0')
    problems = "\n".join(verify_cache(store).problems)
    for expected in (
        cut.name,
        f"{missing.name} is missing",
        "head.safetensors",
        "00002.json is not",
    ):
        assert expected in problems
    assert problems.count(f"{missing.name} is missing") == 1


@pytest.mark.parametrize("form", FORMATS)
def test_the_remedy_that_is_named_heals_the_cache(
    tmp_path: Path, store: LocalStore, form: ShardFormatName
) -> None:
    shards = make_shards()
    seal = build(tmp_path, shards, form)
    shard = tmp_path / seal.shards[1].files[0].file
    intact = shard.read_bytes()
    shard.write_bytes(intact[: len(intact) // 2] + b"!!!" + intact[len(intact) // 2 + 3 :])
    problems = verify_cache(store).problems
    assert any("delete SEALED.json and this shard's commits/*.json" in p for p in problems)
    (tmp_path / "SEALED.json").unlink()
    (tmp_path / "commits" / "00001.json").unlink()
    assert build(tmp_path, shards, form) == seal
    assert shard.read_bytes() == intact
    assert verify_cache(store).problems == ()


def test_numbers_that_are_not_finite_are_found_behind_valid_checksums(
    tmp_path: Path, store: LocalStore
) -> None:
    shards = make_shards(1)
    affinity = shards[0][1].output.affinity
    assert affinity is not None
    affinity.cosine[0, 0] = torch.nan  # after the record has checked itself
    build(tmp_path, shards)
    (problem,) = verify_cache(store).problems
    assert shards[0][1].sample.key in problem
    assert "NaN" in problem


def test_an_unsealed_cache_is_refused(store: LocalStore) -> None:
    write_plan(store, make_plan(make_shards()))
    with pytest.raises(IncompleteCacheError, match="0 of 3"):
        verify_cache(store)


def test_a_wrong_checksum_in_the_seal_is_found(tmp_path: Path, store: LocalStore) -> None:
    seal = build(tmp_path, make_shards(1))
    edit_record(tmp_path / "SEALED.json", seal.shards[0].files[0].sha256, "0" * 64)
    assert any("SHA-256" in problem for problem in verify_cache(store).problems)


def test_the_report_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    seal = build(tmp_path, make_shards())
    for commit in seal.shards:
        path = tmp_path / commit.files[0].file
        path.write_bytes(path.read_bytes()[:-1])
    reports = [verify_cache(tmp_path, num_threads=number) for number in (1, 2, 5)]
    assert reports[0] == reports[1] == reports[2]
    assert len(reports[0].problems) == 3
    with pytest.raises(ValueError, match="num_threads is 0"):
        verify_cache(tmp_path, num_threads=0)
