"""One hostile sample is refused by name, and the samples around it are read."""

import io
import json
import os
import socket
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.build import SourceConfig
from pipeline.sources import conversations
from pipeline.sources.source import open_source, scan
from teacher_cache.schema.manifest import Plan, read_record, record_bytes
from teacher_cache.schema.samples import RejectedSample
from tests.pipeline.sources.test_media import SHOWN, TURNS, picture, write_tar
from tests.support.strategies import make_spec

Json = dict[str, Any]

GOOD: Json = {"id": "good", "image": "0.png", "conversations": SHOWN}
DEEP = '{"id": "deep", "conversations": ' + "[" * 100_000 + "]" * 100_000 + "}"
NESTED = json.loads('{"a": ' * 400 + "1" + "}" * 400)


def write_source(folder: Path, *texts: str, name: str = "data.json") -> Path:
    """A source of these entries as texts, each between two good ones."""
    (folder / "0.png").write_bytes(picture())
    entries = [json.dumps(GOOD)]
    for text in texts:
        entries += [text, json.dumps(GOOD)]
    lines = "\n".join(entries)
    (folder / name).write_text(lines if name.endswith("l") else f"[{', '.join(entries)}]")
    return folder / name


def rejections(path: Path | str, **settings: Any) -> list[RejectedSample]:
    """What is rejected of a source; every other sample is found."""
    source = open_source(SourceConfig(path=str(path), **settings))
    found, rejected = scan(source)
    assert len(found) + len(rejected) == len(source)
    assert found
    return rejected


ENTRIES: list[tuple[str, str, str]] = [
    ("NUL in a path", json.dumps({**GOOD, "id": "x", "image": "a\0.png"}), "null byte"),
    ("surrogate in a path", json.dumps({**GOOD, "id": "x", "image": "\ud800"}), "surrogate"),
    ("surrogate in an id", json.dumps({**GOOD, "id": "x\ud800"}), "half of a surrogate pair"),
    (
        "surrogate in a text",
        json.dumps({"id": "x", "conversations": [{"from": "human", "value": "\udfff"}, TURNS[1]]}),
        "half of a surrogate pair",
    ),
    (
        "surrogate in an answer",
        json.dumps({"id": "x", "question": "a", "answers": ["b", "\ud800"]}),
        "half of a surrogate pair",
    ),
    ("a field nested deep", json.dumps({**GOOD, "id": "x", "meta": NESTED}), "nested too deep"),
    ("no JSON object", "7", "expected a JSON object"),
]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize(("text", "reason"), [e[1:] for e in ENTRIES], ids=[e[0] for e in ENTRIES])
def test_a_hostile_entry_is_refused_by_name(
    text: str, reason: str, name: str, tmp_path: Path
) -> None:
    (rejected,) = rejections(write_source(tmp_path, text, name=name))
    assert rejected.key == "index-1"
    assert rejected.source_id.startswith("x" if '"x' in text else name)
    assert reason in rejected.reason
    assert name in rejected.reason


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_an_entry_nested_too_deep_to_parse_is_one_rejected_sample(
    name: str, tmp_path: Path
) -> None:
    """In a list as well, whose other entries have brackets, commas and quotes in their texts."""
    odd = json.dumps({"id": "odd", "caption": '],[{"\\"', "image": "0.png"})
    path = write_source(tmp_path, DEEP, odd, name=name)
    (rejected,) = rejections(path)
    assert (rejected.key, rejected.source_id) == ("index-1", f"{name}:1")
    assert "recursion" in rejected.reason
    assert open_source(SourceConfig(path=str(path)))[3].messages[1].text == '],[{"\\"'


def test_rejections_with_hostile_names_can_be_stored_and_read(tmp_path: Path) -> None:
    rejected = rejections(write_source(tmp_path, ENTRIES[1][1], ENTRIES[2][1], ENTRIES[3][1]))
    plan = Plan(
        spec=make_spec(), format="arrow", source="x", shards=((),), rejected=tuple(rejected)
    )
    assert read_record(Plan, record_bytes(plan), "plan") == plan


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_suffix(".pipe"))
    path.symlink_to(path.with_suffix(".pipe"))


def link_to_endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_terminal(path: Path) -> None:
    path.symlink_to("/dev/tty")


def unix_socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


SPECIAL: list[tuple[Callable[[Path], object], str]] = [
    (pipe, "named pipe"),
    (link_to_pipe, "named pipe"),
    (link_to_endless_device, "character device"),
    (link_to_terminal, "character device"),
    (unix_socket, "socket"),
    (Path.mkdir, "folder"),
    (loop, "symbolic links"),
]


@pytest.mark.parametrize(("make", "kind"), SPECIAL)
def test_what_is_no_regular_file_is_refused_unopened(
    make: Callable[[Path], object], kind: str, tmp_path: Path
) -> None:
    make(tmp_path / "odd.png")
    entry = json.dumps({**GOOD, "id": "x", "image": "odd.png"})
    (rejected,) = rejections(write_source(tmp_path, entry))
    assert rejected.source_id == "x"
    assert kind in rejected.reason


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.tar", "a.parquet"])
@pytest.mark.parametrize("make", [pipe, link_to_pipe, link_to_endless_device])
def test_a_source_that_is_no_regular_file_is_refused_unopened(
    make: Callable[[Path], object], name: str, tmp_path: Path
) -> None:
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: .*(named pipe|character device), not a regular"):
        open_source(SourceConfig(path=str(tmp_path / name)))


def icon_of(inner: bytes) -> bytes:
    """An icon whose header says 16 x 16 and whose picture is `inner`."""
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + inner


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("1", (30, 20)).save(buffer, "PNG")
    (tmp_path / "wide.png").write_bytes(buffer.getvalue())
    (tmp_path / "icon.ico").write_bytes(icon_of(buffer.getvalue()))
    wide = json.dumps({**GOOD, "id": "wide", "image": "wide.png"})
    icon = json.dumps({**GOOD, "id": "icon", "image": "icon.ico"})
    path = write_source(tmp_path, wide, icon)
    assert not rejections(path, max_pixels=600)
    refused = rejections(path, max_pixels=599)
    assert [each.source_id for each in refused] == ["wide", "icon"]
    for each in refused:
        assert "30 x 20 pixels, more than --max-pixels 599" in each.reason
    (tmp_path / "wide.png").write_bytes(buffer.getvalue()[:60])  # its header alone
    assert "30 x 20 pixels" in rejections(path, max_pixels=599)[0].reason


def test_a_bomb_is_refused_by_the_default_bound(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    header = bytearray(buffer.getvalue()[:33])
    struct.pack_into(">II", header, 16, 60_000, 60_000)
    struct.pack_into(">I", header, 29, zlib.crc32(header[12:29]))
    (tmp_path / "bomb.png").write_bytes(header + b"\0\0\0\x0aIDAT")
    (rejected,) = rejections(
        write_source(tmp_path, json.dumps({**GOOD, "id": "x", "image": "bomb.png"}))
    )
    assert "3600000000 pixels" in rejected.reason


@pytest.mark.parametrize("bound", [0, -1, 178_956_971])
def test_a_bound_that_cannot_hold_is_refused(bound: int) -> None:
    with pytest.raises(ValueError, match="max_pixels is"):
        SourceConfig(path="a.json", max_pixels=bound)


def test_confined_images_lie_in_the_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "inner").mkdir(parents=True)
    outside.mkdir()
    for folder in (root, outside, root / "inner"):
        (folder / "a.png").write_bytes(picture())
    (root / "link.png").symlink_to(outside / "a.png")
    (root / "door").symlink_to(outside)
    (root / "safe.png").symlink_to("inner/a.png")
    inside = ["a.png", "inner/../a.png", str(root / "a.png"), "safe.png", "inner/a.png"]
    out = ["../outside/a.png", str(outside / "a.png"), "link.png", "door/a.png"]
    out += [f"file://{outside}/a.png", "inner/../../outside/a.png"]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{**GOOD, "id": name, "image": name} for name in inside + out]))
    assert not rejections(path, image_root=root)
    refused = rejections(path, image_root=root, confine_images=True)
    assert [each.source_id for each in refused] == out
    assert all("outside the image root" in each.reason for each in refused)


@pytest.mark.parametrize("error", [MemoryError(), struct.error("short"), KeyError("a")])
def test_any_exception_is_the_samples_rejection(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each kind of source, and at the first and the last thing that is done with a sample."""

    def fail(*_: object, **__: object) -> None:
        raise error

    pq.write_table(pa.Table.from_pylist([{"conversations": TURNS}]), tmp_path / "a.parquet")
    write_tar(tmp_path / "a.tar", {"a.json": json.dumps(TURNS).encode()})
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": TURNS}]))
    for place in ("unread_media", "make_sample"):
        with monkeypatch.context() as patch:
            patch.setattr(conversations, place, fail)
            for name in ("a.json", "a.tar", "a.parquet"):
                _, rejected = scan(open_source(SourceConfig(path=str(tmp_path / name))))
                assert [each.key for each in rejected] == ["index-0"]
                assert name in rejected[0].reason
                said = "not enough memory" if isinstance(error, MemoryError) else str(error)
                assert said in rejected[0].reason


def header_of(name: str, size: int) -> bytes:
    """A tar header with any size, in GNU's binary form."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 4 + size.to_bytes(8, "big", signed=True)
    block[148:155] = b"%06o\0" % (256 + sum(block[:148]) + sum(block[156:512]))
    return bytes(block)


@pytest.mark.parametrize("size", [-1, -512, -1024, -(2**40)])
def test_a_tar_that_leads_backwards_is_refused_with_its_member(size: int, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": picture(), "a.txt": b"A."})
    data = Path(path).read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512) + header_of("b.png", size) + bytes(1024)
    Path(path).write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar: cannot be .*behind a\.txt: .*b\.png has -"):
        open_source(SourceConfig(path=path))


def test_a_member_that_is_there_twice_or_sparse_is_its_samples_rejection(tmp_path: Path) -> None:
    names = ["a.txt", "a.png", "a.png", "b.txt", "b.png", "c.txt", "c.png"]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            data = picture() if name.endswith("png") else name.encode()
            member.type = tarfile.GNUTYPE_SPARSE if name == "c.png" else tarfile.REGTYPE
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    twice, sparse = rejections(tmp_path / "a.tar")
    assert (twice.source_id, sparse.source_id) == ("a", "c")
    assert "member a.png is there twice" in twice.reason
    assert "member c.png is stored sparsely" in sparse.reason


def test_an_imagefolder_is_read_by_folder_and_by_file(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    entries = [
        {"file_name": "1.png", "text": "A square."},
        {"file_names": ["1.png", "2.png"], "question": "Same?", "answer": "No."},
        {"image": "2.png", "file_name": "1.png", "text": "Its image field counts."},
    ]
    lines = "\n".join(map(json.dumps, entries))
    (tmp_path / "metadata.jsonl").write_text(lines)
    for path in (tmp_path, tmp_path / "metadata.jsonl"):
        source = open_source(SourceConfig(path=str(path)))
        images = [source[index].images for index in range(3)]
        assert images == [(picture(1),), (picture(1), picture(2)), (picture(2),)]
        assert source.unread == {"file_name": 1}
    (tmp_path / "other.jsonl").write_text(lines)
    assert rejections(tmp_path / "other.jsonl")  # by that name nobody promises the layout
