"""Nothing that looks like media is passed over in silence, and messages' remedies work."""

import io
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.build import SourceConfig
from pipeline.sources import parquet
from pipeline.sources.source import SampleSource, open_source, scan
from teacher_cache.schema.errors import SampleError

Json = dict[str, Any]

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
SHOWN = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "This."}]


def picture(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def json_source(folder: Path, *entries: Json, name: str = "data.json") -> SampleSource:
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
    (folder / name).write_text(json.dumps(list(entries)))
    return open_source(SourceConfig(path=str(folder / name)))


MEDIA: list[tuple[str, Any]] = [
    ("image_0", "0.png"),
    ("image_path", "0.png"),
    ("picture", "somewhere"),
    ("photo_url", "http://x/0.png"),
    ("video", "a.mp4"),
    ("videos", ["a.mp4"]),
    ("audio", "a.wav"),
    ("mask", "m"),
    ("file", "folder/0.JPG"),
    ("content", "data:image/png;base64,AAAA"),
    ("frames", ["0.png", "1.png"]),
    ("loss", 0),
    ("sample_weight", 0.5),
]


@pytest.mark.parametrize(("name", "value"), MEDIA)
def test_a_sample_that_would_become_text_is_refused_and_named(
    name: str, value: Any, tmp_path: Path
) -> None:
    source = json_source(tmp_path, {"conversations": TURNS, name: value})
    with pytest.raises(SampleError, match=rf"it has no image, but {name}, which is not read"):
        source[0]


@pytest.mark.parametrize(("name", "value"), MEDIA)
def test_beside_an_image_it_is_counted_in_one_warning(
    name: str, value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = {"conversations": SHOWN, "image": "0.png"}
    source = json_source(tmp_path, {**entry, name: value}, entry, {**entry, name: value})
    with caplog.at_level(logging.WARNING):
        found, rejected = scan(source)
    assert (len(found), len(rejected)) == (3, 0)
    (message,) = caplog.messages
    assert f"looks like media: {name} (2)" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_id", "12"),
        ("image_width", 336),
        ("video_id", 7),
        ("width", 3),
        ("source", "coco/train2017"),
        ("image_0", None),
        ("videos", []),
        ("imagery", "satellite"),
        ("task", "loss of vision"),
    ],
)
def test_metadata_is_no_media(
    name: str, value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = json_source(tmp_path, {"conversations": TURNS, name: value})
    assert len(scan(source)[0]) == 1
    assert not caplog.messages


def test_the_remedy_for_an_unread_image_works(tmp_path: Path) -> None:
    """The message says: name the field `image` and mark its place, or remove it."""
    with pytest.raises(SampleError, match="name the field of an image `image` and mark its place"):
        json_source(tmp_path, {"conversations": TURNS, "image_path": "0.png"})[0]
    named = json_source(tmp_path, {"conversations": SHOWN, "image": "0.png"})[0]
    assert named.images == (picture(0),)
    assert json_source(tmp_path, {"conversations": TURNS})[0].images == ()


def test_a_column_of_bytes_is_named_and_metadata_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"conversations": SHOWN, "image": {"bytes": picture(), "path": ""}, "depth": b"\x01"},
        {"conversations": TURNS, "image": None, "depth": b"\x01"},
        {"conversations": TURNS, "image": None, "depth": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found, rejected = scan(open_source(SourceConfig(path=str(tmp_path / "a.parquet"))))
    assert [sample.index for sample in found] == [0, 2]
    assert "it has no image, but depth" in rejected[0].reason
    assert "depth (1)" in caplog.messages[0]


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def test_members_of_a_tar_that_nobody_reads_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = json.dumps({"conversations": TURNS}).encode()
    shown = json.dumps({"conversations": SHOWN, "image": "coco/1.jpg"}).encode()
    path = write_tar(
        tmp_path / "a.tar",
        {"a.json": turns, "a.mp4": b"x", "b.json": shown, "b.png": picture(), "b.mask.npy": b"x"},
    )
    found, rejected = scan(open_source(SourceConfig(path=path)))
    assert [sample.index for sample in found] == [1]
    assert "it has no image, but mp4" in rejected[0].reason
    assert "mask.npy (1)" in caplog.messages[0]


def test_a_path_in_a_tar_without_the_member_is_refused(tmp_path: Path) -> None:
    entry = json.dumps({"conversations": SHOWN, "image": "coco/1.jpg"}).encode()
    path = write_tar(tmp_path / "a.tar", {"a.json": entry})
    with pytest.raises(SampleError, match=r"an image is the path 'coco/1.jpg'; embed the image"):
        open_source(SourceConfig(path=path))[0]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "video", "video": "a.mp4"}, "other media are not read"),
        ({"type": "image", "index": 2}, "shows image 2 of 1 images"),
        ({"type": "image", "index": -1}, "shows image -1 of 1 images"),
        ({"type": "image_url", "image_url": {"url": "http://x/a.png"}}, "is a URL; download it"),
        ({"type": "image", "image": "absent.png"}, "cannot be read"),
        ({"type": "image", "image": "data:image/png;base64,?"}, "cannot be read"),
    ],
)
def test_a_part_that_cannot_be_read_is_refused(part: Json, reason: str, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]
    listed = {"images": ["0.png"]} if "index" in part else {}
    source = json_source(tmp_path, {**listed, "messages": messages})
    with pytest.raises(SampleError, match=reason):
        source[0]


def test_a_turn_that_is_not_learnt_changes_the_key_and_no_other_does(tmp_path: Path) -> None:
    plain, ones, masked = (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **more}]
        for more in ({}, {"loss": 1}, {"loss": 0})
    )
    keys = [json_source(tmp_path, {"messages": turns})[0].key for turns in (plain, ones, masked)]
    assert keys[0] == keys[1] != keys[2]
    with pytest.raises(SampleError, match=r"turn 1 has loss 0.5, expected 0, 1"):
        json_source(tmp_path, {"messages": [plain[0], {**plain[1], "loss": 0.5}]})[0]


def test_rows_are_read_a_few_at_a_time_in_any_order(tmp_path: Path) -> None:
    """One row group of 40 rows; sixteen rows are in memory."""
    rows = [
        {"id": str(n), "image": {"bytes": picture(n), "path": ""}, "conversations": SHOWN}
        for n in range(40)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=40)
    source = open_source(SourceConfig(path=str(tmp_path / "a.parquet")))
    for index in (*range(40), 39, 0, 17, 16, 15, 33):
        assert source[index].source_id == str(index)
        assert source[index].images == (picture(index),)


def test_folders_globs_and_braces_stand_for_files_of_one_kind(tmp_path: Path) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    for name in ("train-0", "train-1", "test-0"):
        table = pa.Table.from_pylist([{"id": name, "conversations": TURNS}])
        pq.write_table(table, tmp_path / "set" / "data" / f"{name}.parquet")
        (tmp_path / f"{name}.json").write_text(json.dumps([{"id": name, "conversations": TURNS}]))
        write_tar(tmp_path / f"{name}.tar", {f"{name}.json": json.dumps(TURNS).encode()})

    def ids(path: str) -> list[str]:
        source = open_source(SourceConfig(path=f"{tmp_path}/{path}"))
        return [source[index].source_id for index in range(len(source))]

    assert ids("set") == ["test-0", "train-0", "train-1"]
    assert ids("set/data/train-*.parquet") == ["train-0", "train-1"]
    assert ids("train-{1..0}.json") == ["train-1", "train-0"]
    assert ids("t*-0.json") == ["test-0", "train-0"]
    assert ids("train-?.tar") == ["train-0", "train-1"]
    with pytest.raises(ValueError, match=r"files that end in .json, .tar; .*one kind"):
        ids("train-0.{json,tar}")
    with pytest.raises(ValueError, match=r"no such file or folder; check the path"):
        ids("train-{0..2}.json")


@pytest.mark.parametrize("path", ["s3://bucket/train.json", "https://x/{0..3}.tar", "gs://b/a"])
def test_a_url_is_refused_with_the_remedy(path: str) -> None:
    with pytest.raises(ValueError, match="read from files, not from URLs; download it or mount"):
        open_source(SourceConfig(path=path))


def test_an_image_that_no_part_names_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = [{"type": "image", "index": 2}, {"type": "image", "index": 2}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]
    listed = ["0.png", "1.png", "2.png"]
    source = json_source(tmp_path, {"images": listed, "messages": messages})
    assert source[0].images == (picture(2), picture(2))
    caplog.clear()
    scan(source)
    assert "an image that no part shows (1)" in caplog.messages[0], "samples are counted"


@pytest.mark.parametrize("error", [OSError("gone"), pa.ArrowInvalid("damaged page")])
def test_a_row_group_that_cannot_be_read_leaves_no_row_of_another_behind(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": str(n), "conversations": TURNS} for n in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
    source = open_source(SourceConfig(path=str(tmp_path / "a.parquet")))
    assert source[3].source_id == "3"
    read = parquet._batches  # pyright: ignore[reportPrivateUsage]
    failures = iter([error])

    def fails_once(*place: Any) -> Any:
        if (found := next(failures, None)) is not None:
            raise found
        return read(*place)

    monkeypatch.setattr(parquet, "_batches", lambda *place: (r for r in fails_once(*place)))
    with pytest.raises(SampleError, match=r"row 0 of row group 1: cannot be read as Parquet"):
        source[4]
    assert [source[index].source_id for index in (7, 4, 3)] == ["7", "4", "3"]
