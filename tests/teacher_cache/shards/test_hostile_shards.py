"""What a forger can write is refused, whatever it claims, in little memory, and nothing is run.

Checksums are no help against forgers: here they are always right. Damage without intent is in
shards/contract.py, forged owners in test_shared_rows.py.
"""

import dataclasses
import gzip
import pickle
import random
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import zstandard

from teacher_cache.codec.columns import TIER_PARTS, columns_of, encode_column, output_columns
from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.shards.arrow_layout import batch_blocks
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.shards.formats import shard_format
from teacher_cache.shards.rows import encode_row, read_sample
from tests.support.hostile import Trap, little_memory, rebound, rewrite_arrow, rewrite_tar
from tests.support.strategies import VOCAB_SIZE, assert_same, make_cached, make_spec

FORMS: tuple[ShardFormatName, ...] = ("arrow", "webdataset")
PARTS = TIER_PARTS["topk"]
COLUMNS = columns_of(PARTS)
CACHED = [make_cached(1), make_cached(2)]
SPEC = make_spec("topk")
LITTLE = 2**27
"""Memory to refuse a shard in: pyarrow's and zstd's own needs, not those that the shard claims."""


def rows() -> list[EncodedRow]:
    return [encode_row(cached, SPEC) for cached in CACHED]


def write(path: Path, form: ShardFormatName, content: Sequence[EncodedRow] | None = None) -> Path:
    shard_format(form).write(path, rows() if content is None else content, COLUMNS, {"a": "b"})
    return path


def read(path: Path, form: ShardFormatName, row: int = 0) -> None:
    """Open and read a row, which must be the one that was written."""
    shard = shard_format(form).open(path)
    key = CACHED[row].sample.key
    assert_same(read_sample(shard, row, key, PARTS, SPEC), CACHED[row])


def _bomb(num_bytes: int) -> bytes:
    """A frame of a consistent column: zeros, so many that a few kilobytes hold them."""
    header = struct.pack("<BBBI", 1, 0, 1, (num_bytes - 7) // 4)
    stream = zstandard.ZstdCompressor(level=1, write_checksum=True).compressobj(size=num_bytes)
    pieces = [stream.compress(header)]
    block = bytes(2**20)
    pieces += [
        stream.compress(block[: min(2**20, num_bytes - 7 - start)])
        for start in range(0, num_bytes - 7, 2**20)
    ]
    return b"".join([*pieces, stream.flush()])


def _claim(num_bytes: int) -> bytes:
    """A frame that claims a content which it does not have."""
    return b"\x28\xb5\x2f\xfd\xe4" + struct.pack("<Q", num_bytes) + bytes(64)


def _changed(name: str, change: Callable[[torch.Tensor], object]) -> bytes:
    values = output_columns(CACHED[0].output)[name].clone()
    change(values)
    return encode_column(name, values)


FRAMES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "ids beyond the vocabulary": (
        "v_ids",
        lambda: _changed("v_ids", lambda ids: ids[0].fill_(VOCAB_SIZE)),
        f"expected 0..{VOCAB_SIZE - 1}",
    ),
    "negative ids": (
        "r_ids",
        lambda: _changed("r_ids", lambda ids: ids[0].fill_(-1)),
        f"expected 0..{VOCAB_SIZE - 1}",
    ),
    "logits that are not finite": (
        "v_logits",
        lambda: _changed("v_logits", lambda logits: logits[0].fill_(torch.inf)),
        "NaN or infinite",
    ),
    "a view of no size": (
        "views",
        lambda: _changed("views", lambda views: views.fill_(-1)),
        "a view needs rows",
    ),
    "views of 2**60 tokens": (
        "views",
        lambda: _changed("views", lambda views: views.fill_(2**30)),
        "expected 1152921504606846976",
    ),
    "a decompression bomb": ("v_lse", lambda: _bomb(2**29), "claims 536870912 bytes"),
    "a claim of 2**40 bytes": ("v_lse", lambda: _claim(2**40), "claims 1099511627776 bytes"),
    "a pickle": ("v_lse", lambda: pickle.dumps(Trap(Path("sprung"))), "zstd frame is damaged"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FRAMES)
def test_a_hostile_frame_is_refused(
    tmp_path: Path, form: ShardFormatName, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    column, make, found = FRAMES[name]
    first, second = rows()
    bad = dataclasses.replace(first, frames={**first.frames, column: make()})
    path = write(tmp_path / "shard", form, [bad, second])
    with little_memory(LITTLE), pytest.raises(ShardCorruptError, match=found) as refused:
        read(path, form)
    assert first.key in str(refused.value)
    assert not (tmp_path / "sprung").exists()
    read(path, form, 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000, '{"a": NaN}', "null", "[[]]"])
def test_hostile_json_is_refused(tmp_path: Path, form: ShardFormatName, text: str) -> None:
    first, second = rows()
    bad = dataclasses.replace(first, messages=text)
    path = write(tmp_path / "messages", form, [bad, second])
    with pytest.raises(ShardCorruptError, match=first.key):
        read(path, form)
    path = write(tmp_path / "checks", form)
    if form == "arrow":
        rewrite_arrow(path, lambda stored: stored[0].update(checks=text))
    else:
        rewrite_tar(
            path, lambda members: members.update({f"{first.key}.sample.json": text.encode()})
        )
    with pytest.raises(ShardCorruptError, match="checks"):
        read(path, form)
    read(path, form, 1)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../secret", "~/.netrc", "C:\\secret", ""])
def test_arrow_keys_that_are_paths_are_refused(tmp_path: Path, name: str) -> None:
    def change(stored: list[dict[str, Any]]) -> None:
        row = stored[0]
        texts = (row["source_id"], row["messages"], row["checks"], None)
        row.update(key=name, checks=rebound(name, *texts))

    path = write(tmp_path / "shard", "arrow")
    rewrite_arrow(path, change)
    with pytest.raises(ShardCorruptError, match="not a sample key"):
        read(path, "arrow")


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"compression": "lz4"},
        {"compression": "zstd", "metadata_version": pa.ipc.MetadataVersion.V4},
        {"metadata_version": pa.ipc.MetadataVersion.V4},
        {"use_legacy_format": True},
    ],
    ids=str,
)
def test_arrow_batches_that_are_compressed_or_old_are_never_unpacked(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    path = write(tmp_path / "shard", "arrow")
    size = 2**28 if "compression" in options else 1
    rewrite_arrow(
        path,
        lambda stored: stored[0].update(images=[bytes(size)]),
        pa.ipc.IpcWriteOptions(**options),
    )
    assert path.stat().st_size < 2**22
    with little_memory(LITTLE), pytest.raises(ShardCorruptError, match=r"is compressed|no .*batch"):
        read(path, "arrow")


def test_arrow_columns_of_other_types_are_refused_and_nothing_is_unpickled(tmp_path: Path) -> None:
    path = write(tmp_path / "shard", "arrow")
    plain = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).schema
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": trap,
    }
    for column, kind, metadata in (
        ("source_id", pa.dictionary(pa.int32(), pa.string()), None),
        ("source_id", pa.binary(), None),
        ("v_ids", pa.binary(), None),
        ("source_id", pa.string(), extension),
    ):
        at = plain.get_field_index(column)
        field = pa.field(column, kind, nullable=False, metadata=metadata)
        path = write(tmp_path / f"{column} {kind} {metadata is None}", "arrow")
        rewrite_arrow(path, lambda stored: stored.pop(), schema=plain.set(at, field))
        if metadata is None:
            with pytest.raises(ShardCorruptError, match=r"it has columns|it has dictionaries"):
                shard_format("arrow").open(path)
        else:
            read(path, "arrow")  # what it says of itself is not looked at
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("value", [-8, 2**40, 2**62, -(2**62), None], ids=str)
def test_arrow_batches_that_overlap_or_lie_outside_are_refused(
    tmp_path: Path, value: int | None
) -> None:
    path = write(tmp_path / "shard", "arrow")
    data = bytearray(path.read_bytes())
    first, second = batch_blocks(memoryview(data))
    place = data.rindex(struct.pack("<q", second.start))
    struct.pack_into("<q", data, place, first.start if value is None else value)
    path.write_bytes(data)
    with little_memory(LITTLE), pytest.raises(ShardCorruptError, match=r"overlap or lie outside"):
        shard_format("arrow").open(path)


def test_no_number_in_an_arrow_file_takes_memory_or_gives_other_records(tmp_path: Path) -> None:
    """Every word of the file in turn says something else: huge, negative, or what another says."""
    path = write(tmp_path / "shard", "arrow")
    intact = path.read_bytes()
    draws = random.Random(0)
    words = {place: intact[place : place + 8] for place in range(0, len(intact) - 8, 4)}
    num_refused = 0
    with little_memory(LITTLE):
        for place in draws.sample(sorted(words), 1000):
            values = [2**40, -8, 2**62, -(2**63), draws.choice([*words.values()])]
            value = draws.choice(values)
            octets = value if isinstance(value, bytes) else struct.pack("<q", value)
            path.write_bytes(intact[:place] + octets + intact[place + 8 :])
            try:
                read(path, "arrow")
            except ShardCorruptError:
                num_refused += 1
    assert num_refused > 200


def _header(name: str, size: int, kind: bytes) -> bytes:
    """A tar header with any size at all, and a right checksum."""
    member = tarfile.TarInfo(name)
    member.type = kind
    header = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"\x80" + size.to_bytes(11, "big") if size >= 0 else b"\xff" * 11 + b"\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("size", [2**33, 2**40, 2**63, -256])
@pytest.mark.parametrize(
    "kind",
    [
        tarfile.REGTYPE,
        tarfile.CONTTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.GNUTYPE_SPARSE,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        b"?",
    ],
)
def test_a_tar_header_that_claims_any_size_is_refused(
    tmp_path: Path, kind: bytes, size: int
) -> None:
    path = write(tmp_path / "shard", "webdataset")
    data = path.read_bytes()
    name = f"{CACHED[0].sample.key}.x_more.zst"
    for place in (512 * 2, 0):  # behind the metadata, and before it
        path.write_bytes(data[:place] + _header(name, size, kind) + data[place:])
        with (
            little_memory(LITTLE),
            pytest.raises(ShardCorruptError, match=r"not a plain file|is cut off|first member"),
        ):
            shard_format("webdataset").open(path)


def test_a_tar_that_is_compressed_or_has_a_long_tail_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "shard", "webdataset")
    data = path.read_bytes()
    path.write_bytes(gzip.compress(data))
    with pytest.raises(ShardCorruptError, match="not an intact shard"):
        shard_format("webdataset").open(path)
    path.write_bytes(data)
    with path.open("r+b") as file:
        file.truncate(2**26)  # holes, which take no room on the disk
    with little_memory(2**27), pytest.raises(ShardCorruptError, match="does not end"):
        shard_format("webdataset").open(path)


def test_tar_metadata_that_is_hostile_json_is_refused(tmp_path: Path) -> None:
    for text in ("[" * 100_000, "9" * 10_000, "{", "\xff"):
        path = write(tmp_path / f"{ord(text[0])}", "webdataset")
        content = text.encode("latin-1")
        rewrite_tar(path, lambda all_, it=content: all_.update({"__shard__/metadata.json": it}))
        with pytest.raises(ShardCorruptError, match="not an intact shard"):
            shard_format("webdataset").open(path)


def test_little_memory_is_little() -> None:
    with little_memory(LITTLE), pytest.raises(MemoryError):
        bytes(2 * LITTLE)
    assert len(bytes(2 * LITTLE)) == 2 * LITTLE
