"""Shards of several files, and files that other caches have written: read as one, or refused."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from teacher_cache.folder.layout import open_shard, read_encoded_rows
from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.verify import verify_cache
from teacher_cache.folder.writer import (
    commit_shard,
    seal_cache,
    write_encoded_shard,
    write_plan,
    write_shard,
    write_shard_file,
)
from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.schema.manifest import Plan, ShardCommit, ShardFile
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.schema.samples import RejectedSample
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.shards.rows import encode_row
from teacher_cache.storage.local_store import LocalStore
from tests.support.builders import build, flip, make_shards, published
from tests.support.strategies import assert_same, make_plan, make_spec

FORMATS: tuple[ShardFormatName, ...] = ("arrow", "webdataset")
(ROWS,) = make_shards(1)
LATER = frozenset({"a_cosine"})
"""Columns that the layered shards of these tests have in a second file."""


def encoded(rows: Sequence[CachedSample]) -> list[EncodedRow]:
    return [encode_row(row, make_spec()) for row in rows]


def with_columns(row: EncodedRow, later: bool) -> EncodedRow:
    """The row as the first file has it, or as the layer has it."""
    columns = {name: frame for name, frame in row.frames.items() if (name in LATER) == later}
    return dataclasses.replace(row, frames=columns, images=() if later else row.images)


def write_layers(
    store: LocalStore, plan: Plan, base: Sequence[EncodedRow], layer: Sequence[EncodedRow]
) -> ShardCommit:
    """Shard 0 in two files."""
    first = base[0].frames.keys() - LATER
    files = (
        write_shard_file(store, plan, 0, [with_columns(row, False) for row in base], first),
        write_shard_file(store, plan, 0, [with_columns(row, True) for row in layer], LATER),
    )
    return commit_shard(store, plan, record(files, len(base)))


def record(files: tuple[ShardFile, ...], num_rows: int, index: int = 0) -> ShardCommit:
    return ShardCommit(
        index=index,
        files=files,
        num_rows=num_rows,
        num_vision_tokens=8,
        num_response_tokens=sum(int(row.output.is_response.sum()) for row in ROWS),
        num_with_images=2,
        num_vision_records=2,
        num_stored_vision_tokens=8,
    )


@pytest.mark.parametrize("form", FORMATS)
def test_a_layered_shard_reads_as_one(tmp_path: Path, form: ShardFormatName) -> None:
    store = LocalStore(tmp_path)
    plan = write_plan(store, make_plan([ROWS], form=form))
    commit = write_layers(store, plan, encoded(ROWS), encoded(ROWS))
    seal_cache(store)
    reader = CacheReader.open(store)
    for index, row in enumerate(ROWS):
        assert_same(reader.read(index, reader.parts), row)
    assert list(read_encoded_rows(store, plan, commit)) == encoded(ROWS)
    assert verify_cache(store).problems == ()
    assert commit.num_bytes == sum(len(published(tmp_path)[file.file]) for file in commit.files)


def test_a_layer_that_is_not_asked_for_is_not_looked_into(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    plan = write_plan(store, make_plan([ROWS]))
    commit = write_layers(store, plan, encoded(ROWS), encoded(ROWS))
    seal_cache(store)
    layer = tmp_path / commit.files[1].file
    flip(layer, encoded(ROWS)[0].frames["a_cosine"])
    reader = CacheReader.open(store)
    reader.read(0, {"vision", "response"})
    with pytest.raises(ShardCorruptError, match=rf"{layer.name}: sample .*a_cosine"):
        reader.read(0, {"affinity"})
    assert any(layer.name in problem for problem in verify_cache(store).problems)


def test_layers_of_other_rows_are_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    plan = write_plan(store, make_plan([ROWS]))
    good = encoded(ROWS)
    other = [dataclasses.replace(row, source_id="another") for row in good]
    commit = write_layers(store, plan, good, other)
    with pytest.raises(ShardCorruptError, match="with another source_id"):
        open_shard(store, plan, commit).read(0, LATER)
    with pytest.raises(ShardCorruptError, match="with another source_id"):
        seal_cache(store)
    for wrong in (good[::-1], good[:1]):
        with pytest.raises(ValueError, match="not the samples of the plan"):
            write_shard_file(store, plan, 0, [with_columns(row, True) for row in wrong], LATER)


def test_files_must_hold_every_column_once(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    plan = write_plan(store, make_plan([ROWS]))
    columns = encoded(ROWS)[0].frames.keys()
    file = write_shard_file(store, plan, 0, encoded(ROWS), columns)
    short = dataclasses.replace(file, columns=tuple(sorted(columns - LATER)))
    for files in ((), (file, file), (short,)):
        with pytest.raises(ValueError, match="its files hold columns"):
            commit_shard(store, plan, record(files, 2))
    with pytest.raises(ValueError, match="1 rows and 0 rejected"):
        commit_shard(store, plan, record((file,), 1))
    with pytest.raises(ShardCorruptError, match="is missing"):
        commit_shard(store, plan, record((dataclasses.replace(file, file="shards/1-0.arrow"),), 2))


def test_a_foreign_file_is_refused_even_under_a_right_name(tmp_path: Path) -> None:
    shards = make_shards(2)
    store, other = LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")
    seal = build(store, shards)
    foreign = build(other, shards, spec=make_spec(attention="eager")).shards[0].files[0]
    plan = make_plan(shards)
    store.copy_from(other, foreign.file, foreign.file)
    for cache, index in ((plan.fingerprint, 0), (foreign.cache, 1)):
        file = dataclasses.replace(foreign, cache=cache, index=index)
        commit = dataclasses.replace(seal.shards[0], files=(file,))
        with pytest.raises(ShardCorruptError, match=r"emkd\.(cache|shard)"):
            open_shard(store, plan, commit)


def test_encoded_rows_of_one_cache_make_the_same_shard_in_another(tmp_path: Path) -> None:
    seal = build(LocalStore(tmp_path / "a"), [ROWS])
    plan = write_plan(LocalStore(tmp_path / "b"), make_plan([ROWS]))
    stream = read_encoded_rows(LocalStore(tmp_path / "a"), plan, seal.shards[0])
    assert write_encoded_shard(LocalStore(tmp_path / "b"), plan, 0, stream) == seal.shards[0]


def test_other_rejected_samples_are_another_identity_of_the_same_plan(tmp_path: Path) -> None:
    seals = [build(tmp_path / "all", [ROWS])]
    for number, lost in enumerate(ROWS):
        store = LocalStore(tmp_path / f"{number}")
        plan = write_plan(store, make_plan([ROWS]))
        kept = [row for row in ROWS if row is not lost]
        why = RejectedSample(key=lost.sample.key, source_id=lost.sample.source_id, reason="odd")
        write_shard(store, plan, 0, kept, [why], 0.0)
        seals.append(seal_cache(store))
        assert CacheReader.open(store).keys == (kept[0].sample.key,)
    assert len({seal.fingerprint for seal in seals}) == 3
    assert len({seal.plan for seal in seals}) == 1
