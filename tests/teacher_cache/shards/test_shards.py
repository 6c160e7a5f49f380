"""Both shard formats keep the contract; what is particular to each; any sample comes back."""

import dataclasses
import io
import json
import struct
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from teacher_cache.codec.columns import TIER_PARTS, columns_of
from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.schema.options import RecordKind, ShardFormatName
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.shards.contract import METADATA, ShardContract
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.shards.formats import shard_format
from teacher_cache.shards.rows import encode_row, encode_rows, read_sample
from tests.support.strategies import (
    BEARTYPE_DRAWS,
    TIERS,
    assert_same,
    cached_samples,
    make_cached,
    make_spec,
)

pytestmark = BEARTYPE_DRAWS


def encoded(cached: Sequence[CachedSample]) -> list[EncodedRow]:
    return list(encode_rows(cached, make_spec("topk")))


class OfSixRows(ShardContract):
    """The contract for the rows of six small samples."""

    def rows(self) -> list[EncodedRow]:
        return encoded([make_cached(number) for number in range(6)])


class TestArrow(OfSixRows):
    """Arrow IPC."""

    form = shard_format("arrow")

    def test_pyarrow_and_zstandard_alone_can_read_it(self, tmp_path: Path) -> None:
        cached = [make_cached(number) for number in range(3)]
        path = self.write(tmp_path / "shard", encoded(cached))
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        assert table.schema.metadata[b"emkd.shard"] == METADATA["emkd.shard"].encode()
        assert {str(field.type) for field in table.schema} == {
            "string",
            "int32",
            "large_binary",
            "list<item: large_binary>",
        }
        for row, sample in zip(table.to_pylist(), cached, strict=True):
            assert row["source_id"] == sample.sample.source_id
            assert tuple(row["images"]) == sample.sample.images
            assert json.loads(row["messages"])[1]["text"] == sample.sample.messages[1].text
            assert sample.output.vision is not None
            wanted = sample.output.vision.logsumexp.tolist()
            content = zstandard.decompress(row["v_lse"])
            header, numbers = f"<BBBI{len(wanted)}f", [1, 0, 1, len(wanted), *wanted]
            assert list(struct.unpack(header, content)) == numbers


class TestWebDataset(OfSixRows):
    """Tar."""

    form = shard_format("webdataset")

    def test_plain_webdataset_can_read_it(self, tmp_path: Path) -> None:
        cached = [make_cached(number) for number in range(3)]
        path = self.write(tmp_path / "shard", encoded(cached))
        with path.open("rb") as stream:
            rows = list(group_by_keys(tar_file_expander([{"url": path.name, "stream": stream}])))
        assert [row["__key__"] for row in rows] == [sample.sample.key for sample in cached]
        for row, sample in zip(rows, cached, strict=True):
            assert row["0.image.png"] == sample.sample.images[0]
            assert json.loads(row["sample.json"])["source_id"] == sample.sample.source_id
            assert zstandard.decompress(row["v_lse.zst"])[:2] == bytes([1, 0])

    def test_members_say_nothing_of_time_and_place(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "shard", encoded([make_cached(1)]))
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
        names = [member.name for member in members[1:]]
        assert names == sorted(names)

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("{key}.weights.pkl", tarfile.REGTYPE),
            ("{key}.pyd", tarfile.REGTYPE),
            ("/etc/{key}.v_ids.zst", tarfile.REGTYPE),
            ("../{key}.v_ids.zst", tarfile.REGTYPE),
            ("{key}.v_ids.zst", tarfile.REGTYPE),
            ("{key}.x_more.zst", tarfile.SYMTYPE),
            ("{key}.x_more.zst", tarfile.LNKTYPE),
            ("{key}.x_more.zst", tarfile.CHRTYPE),
            ("{key}.x_more.zst", tarfile.DIRTYPE),
            ("{key}.x_more.zst", tarfile.GNUTYPE_SPARSE),
        ],
    )
    def test_a_member_that_does_not_belong_is_refused(
        self, tmp_path: Path, name: str, kind: bytes
    ) -> None:
        cached = make_cached(1)
        path = self.write(tmp_path / "shard", encoded([cached]))
        with tarfile.open(path, "a:") as tar:
            member = tarfile.TarInfo(name.format(key=cached.sample.key))
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member, io.BytesIO())
        with pytest.raises(ShardCorruptError, match=r"does not belong|not a plain file|twice"):
            shard_format("webdataset").open(path)


def test_a_row_key_must_be_a_sample_key() -> None:
    for key in ("", "k0", "../" + "0" * 32, "0" * 32 + "-0", "0" * 33):
        with pytest.raises(ValueError, match="not a sample key"):
            EncodedRow(key=key, source_id="", messages="[]", images=(), frames={})


@pytest.mark.parametrize("form", ["arrow", "webdataset"])
@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.differing_executors],  # one test, two formats
)
@given(data=st.data(), records=st.sampled_from(TIERS))
def test_any_samples_come_back_to_the_bit(
    form: ShardFormatName, data: st.DataObject, records: RecordKind
) -> None:
    rows = st.lists(cached_samples(records), max_size=3, unique_by=lambda row: row.sample.key)
    cached, spec, parts = data.draw(rows), make_spec(records), TIER_PARTS[records]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        shard_format(form).write(path, encode_rows(cached, spec), columns_of(parts), METADATA)
        shard = shard_format(form).open(path)
        assert shard.keys == tuple(sample.sample.key for sample in cached)
        for row, sample in enumerate(cached):
            assert_same(read_sample(shard, row, sample.sample.key, parts, spec), sample)


def test_content_that_is_not_the_keys_is_refused(tmp_path: Path) -> None:
    one, other, spec = make_cached(1), make_cached(2), make_spec("topk")
    swapped = dataclasses.replace(one.sample, key=other.sample.key)
    row = encode_row(dataclasses.replace(one, sample=swapped), spec)
    form = shard_format("arrow")
    form.write(tmp_path / "shard", [row], row.frames, {})
    with pytest.raises(ShardCorruptError, match="not those that the key names"):
        read_sample(form.open(tmp_path / "shard"), 0, other.sample.key, {"vision"}, spec)
