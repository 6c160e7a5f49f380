"""Rows that share a vision record: complete when read, stored once, refused where they lie."""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codec.columns import TIER_PARTS, VISION_COLUMNS, columns_of
from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.schema.options import RecordKind, ShardFormatName
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.shards.formats import shard_format
from teacher_cache.shards.layered import LayeredShard
from teacher_cache.shards.rows import encode_row, encode_rows, read_sample
from teacher_cache.shards.shard import Shard
from tests.support.builders import flip
from tests.support.hostile import rebound, rewrite_arrow, rewrite_tar
from tests.support.strategies import (
    BEARTYPE_DRAWS,
    TIERS,
    asked_again,
    assert_same,
    cached_samples,
    make_cached,
    make_output,
    make_spec,
)

pytestmark = BEARTYPE_DRAWS

FORMS: tuple[ShardFormatName, ...] = ("arrow", "webdataset")
COLUMNS = columns_of(TIER_PARTS["topk"])
ONE, OTHER = make_cached(1), make_cached(2)
ROWS = [ONE, asked_again(ONE, 3), OTHER, asked_again(ONE, 4)]
"""Two records; rows 1 and 3 have that of row 0."""


def write(path: Path, form: ShardFormatName, rows: Sequence[EncodedRow]) -> Path:
    shard_format(form).write(path, rows, COLUMNS, {"emkd.shard": "0"})
    return path


def encoded(cached: Sequence[CachedSample] = ROWS) -> list[EncodedRow]:
    return list(encode_rows(cached, make_spec()))


def read_all(shard: Shard, cached: Sequence[CachedSample], records: RecordKind = "topk") -> None:
    for row, wanted in enumerate(cached):
        parts, spec = TIER_PARTS[records], make_spec(records)
        assert_same(read_sample(shard, row, wanted.sample.key, parts, spec), wanted)


@settings(deadline=None, max_examples=20)
@given(data=st.data(), records=st.sampled_from(TIERS), form=st.sampled_from(FORMS))
def test_rows_that_share_come_back_to_the_bit(
    data: st.DataObject, records: RecordKind, form: ShardFormatName
) -> None:
    owners = data.draw(
        st.lists(cached_samples(records), max_size=3, unique_by=lambda row: row.sample.key)
    )
    cached = [*owners]
    for number in range(data.draw(st.integers(0, 4)) if owners else 0):
        owner = data.draw(st.sampled_from(owners))
        at = data.draw(st.integers(cached.index(owner) + 1, len(cached)))
        cached.insert(at, asked_again(owner, number, records))
    spec = make_spec(records)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        columns = columns_of(TIER_PARTS[records])
        shard_format(form).write(path, encode_rows(cached, spec), columns, {})
        read_all(shard_format(form).open(path), cached, records)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_costs_at_most_one_row_more(
    tmp_path: Path, form: ShardFormatName, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shard_format(form).open(write(tmp_path / "shard", form, encoded()))
    fetched: list[tuple[int, frozenset[str]]] = []
    fetch = type(shard)._fetch  # pyright: ignore[reportPrivateUsage]

    def counted(self: Shard, row: int, columns: Any) -> Any:
        fetched.append((row, frozenset(columns)))
        return fetch(self, row, columns)

    monkeypatch.setattr(type(shard), "_fetch", counted)
    assert shard.read(2, COLUMNS).shared_from is None
    assert shard.read(3, COLUMNS).shared_from == ONE.sample.key
    assert fetched == [(2, COLUMNS), (3, COLUMNS), (0, COLUMNS & VISION_COLUMNS)]
    fetched.clear()
    shard.read(3, ["r_ids", "views"])
    assert fetched == [(3, {"r_ids", "views"}), (0, {"views"})]


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_owner_is_noticed_in_every_row_that_shares_from_it(
    tmp_path: Path, form: ShardFormatName
) -> None:
    rows = encoded()
    for piece in (rows[0].images[0], rows[0].frames["v_logits"], rows[0].frames["views"]):
        path = tmp_path / f"{len(piece)}-{piece[8]}"
        flip(write(path, form, rows), piece)
        shard = shard_format(form).open(path)
        for row in (0, 1, 3):
            with pytest.raises(ShardCorruptError, match=f"sample {rows[row].key}.*damaged"):
                shard.read(row, COLUMNS)
        assert shard.read(2, COLUMNS) == rows[2]


@pytest.mark.parametrize("form", FORMS)
def test_layers_of_a_shard_share_alike_or_are_refused(
    tmp_path: Path, form: ShardFormatName
) -> None:
    rows, later = encoded(), frozenset({"v_lse", "a_cosine"})

    def layer(name: str, columns: frozenset[str], content: Sequence[EncodedRow]) -> Shard:
        parts = [
            dataclasses.replace(
                row,
                frames={column: row.frames[column] for column in columns},
                images=() if columns == later else row.images,
            )
            for row in content
        ]
        shard_format(form).write(tmp_path / name, parts, columns, {})
        return shard_format(form).open(tmp_path / name)

    base, further = layer("base", COLUMNS - later, rows), layer("further", later, rows)
    shard = LayeredShard([base, further], [COLUMNS - later, later])
    assert [shard.read(row, COLUMNS) for row in range(len(rows))] == rows
    apart = layer("apart", later, [dataclasses.replace(row, shared_from=None) for row in rows])
    shard = LayeredShard([base, apart], [COLUMNS - later, later])
    assert shard.read(0, COLUMNS) == rows[0]
    with pytest.raises(ShardCorruptError, match="another shared_from"):
        shard.read(1, COLUMNS)


def test_what_is_not_shared_cannot_be_written_as_shared(tmp_path: Path) -> None:
    rows = encoded()
    liar = dataclasses.replace(rows[2], shared_from=ONE.sample.key)
    orders = {
        "absent": rows[1:],
        "later": [rows[1], rows[0]],
        "chain": [rows[0], rows[1], dataclasses.replace(rows[3], shared_from=rows[1].key)],
        "other content": [rows[0], liar],
    }
    for form in FORMS:
        for name, order in orders.items():
            with pytest.raises(ValueError, match="no earlier row with the same"):
                write(tmp_path / f"{form} {name}", form, order)
    other = dataclasses.replace(ROWS[1].output, vision=make_output("topk", 9).vision)
    for cached in (ROWS[1:], [ONE, dataclasses.replace(ROWS[1], output=other)]):
        with pytest.raises(ValueError, match="no earlier sample with that record"):
            encoded(cached)


def test_a_row_that_shares_can_be_encoded_alone() -> None:
    assert [encode_row(each, make_spec()) for each in ROWS] == encoded()


@pytest.mark.parametrize(
    ("owner", "number", "found"),
    [
        (ONE.sample.key, 4, r"row 4, which is not an earlier row"),
        (ONE.sample.key, 3, r"row 3, which is not an earlier row"),
        (ONE.sample.key, -2, r"row -2, which is not an earlier row"),
        (ONE.sample.key, -1, r"shares from [0-9a-f]+, row None"),
        ("", 0, r"shares from None, row 0"),
        (ROWS[1].sample.key, 1, r"row 1 is [0-9a-f]+ and shares one itself"),
        (ONE.sample.key, 2, r"row 2 is [0-9a-f]+ and has its own record"),
        (OTHER.sample.key, 2, r"its images are damaged"),
        ("../secret", 0, r"not a sample key"),
    ],
)
def test_arrow_rows_that_name_a_wrong_owner_are_refused(
    tmp_path: Path, owner: str, number: int, found: str
) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        row = rows[3]
        row["shared_from"], row["shared_row"] = owner, number
        texts = (row["key"], row["source_id"], row["messages"], row["checks"])
        if owner != "../secret":
            row["checks"] = rebound(*texts, owner or None)

    rewrite_arrow(write(tmp_path / "shard", "arrow", encoded()), change)
    shard = shard_format("arrow").open(tmp_path / "shard")
    with pytest.raises(ShardCorruptError, match=found):
        shard.read(3, COLUMNS)
    assert shard.read(1, COLUMNS) == encoded()[1]


@pytest.mark.parametrize(
    ("owner", "found"),
    [
        ("0" * 32, r"cannot be read"),
        (ROWS[3].sample.key, r"row 3, which is not an earlier row"),
        (ROWS[1].sample.key, r"row 1 is [0-9a-f]+ and shares one itself"),
        (OTHER.sample.key, r"its images are damaged"),
        ("../secret", r"not a sample key"),
        (7, r"cannot be read"),
        ([], r"cannot be read"),
    ],
)
def test_tar_rows_that_name_a_wrong_owner_are_refused(
    tmp_path: Path, owner: Any, found: str
) -> None:
    def change(members: dict[str, bytes]) -> None:
        key = ROWS[3].sample.key
        text = json.loads(members[f"{key}.sample.json"])
        if isinstance(owner, str) and owner != "../secret":
            texts = (key, text["source_id"], text["messages"], text["checks"])
            text["checks"] = rebound(*texts, owner)
        text["shared_from"] = owner
        members[f"{key}.sample.json"] = json.dumps(text).encode()

    rewrite_tar(write(tmp_path / "shard", "webdataset", encoded()), change)
    shard = shard_format("webdataset").open(tmp_path / "shard")
    with pytest.raises(ShardCorruptError, match=found):
        shard.read(3, COLUMNS)
    assert shard.read(1, COLUMNS) == encoded()[1]


def test_a_row_with_a_record_beside_its_owners_is_refused(tmp_path: Path) -> None:
    key, extra = ROWS[1].sample.key, encoded()[0]
    rewrite_arrow(
        write(tmp_path / "arrow", "arrow", encoded()),
        lambda rows: rows[1].update(v_ids=extra.frames["v_ids"]),
    )
    rewrite_tar(
        write(tmp_path / "webdataset", "webdataset", encoded()),
        lambda all_: all_.update({f"{key}.0.image.png": extra.images[0]}),
    )
    for form in FORMS:
        with pytest.raises(ShardCorruptError, match="a vision record beside that of"):
            shard_format(form).open(tmp_path / form).read(1, COLUMNS)


def test_an_owner_without_what_it_stores_for_others_is_refused(tmp_path: Path) -> None:
    rewrite_arrow(
        write(tmp_path / "arrow", "arrow", encoded()), lambda rows: rows[0].update(v_lse=b"")
    )
    rewrite_tar(
        write(tmp_path / "webdataset", "webdataset", encoded()),
        lambda members: members.pop(f"{ONE.sample.key}.v_lse.zst"),
    )
    for form in FORMS:
        shard = shard_format(form).open(tmp_path / form)
        for row in (0, 1, 3):
            with pytest.raises(ShardCorruptError, match="columns v_lse are missing"):
                shard.read(row, COLUMNS)
