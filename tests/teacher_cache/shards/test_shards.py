"""The shard contract for both formats, and what is particular to each."""

import io
import json
import struct
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from webdataset.tariterators import group_by_keys, tar_file_expander

from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.shards.formats import shard_format
from tests.support.shard_contract import METADATA, ShardContract
from tests.support.strategies import BEARTYPE_DRAWS, make_cached

pytestmark = BEARTYPE_DRAWS


class TestArrow(ShardContract):
    """Arrow IPC."""

    name = "arrow"

    def test_pyarrow_and_zstandard_alone_can_read_it(self, tmp_path: Path) -> None:
        cached = [make_cached(number) for number in range(3)]
        path = self.written(tmp_path, cached, "topk")
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


class TestWebDataset(ShardContract):
    """Tar."""

    name = "webdataset"

    def test_plain_webdataset_can_read_it(self, tmp_path: Path) -> None:
        cached = [make_cached(number) for number in range(3)]
        path = self.written(tmp_path, cached, "topk")
        with path.open("rb") as stream:
            rows = list(group_by_keys(tar_file_expander([{"url": path.name, "stream": stream}])))
        assert [row["__key__"] for row in rows] == [sample.sample.key for sample in cached]
        for row, sample in zip(rows, cached, strict=True):
            assert row["0.image.png"] == sample.sample.images[0]
            assert json.loads(row["sample.json"])["source_id"] == sample.sample.source_id
            assert zstandard.decompress(row["v_lse.zst"])[:2] == bytes([1, 0])

    def test_members_say_nothing_of_time_and_place(self, tmp_path: Path) -> None:
        path = self.written(tmp_path, [make_cached(1)], "topk")
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
        path = self.written(tmp_path, [cached], "topk")
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
