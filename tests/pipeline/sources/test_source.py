"""Promises of pipeline/sources/source.py and of the kinds of sources behind it."""

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.build import SourceConfig
from pipeline.sources.source import SampleSource, open_source, scan
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.samples import Message, Sample, sample_key


def _image(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def _turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


Entry = tuple[str, list[bytes], list[dict[str, str]]]
"""id, images, turns."""

ENTRIES: list[Entry] = [
    ("one", [_image(1)], _turns("<image>\nWhat is it?", "Noise.")),
    ("turns", [_image(2, "JPEG")], _turns("Look: <image>", "I see.", "And now?", "Still noise.")),
    ("many", [_image(i) for i in range(11)], _turns("<image>" * 11, "Eleven.")),
    ("text", [], [{"from": "system", "value": "Be brief."}, *_turns("Hello", "Hi \u00e9")]),
    ("one", [_image(1)], _turns("<image>\nWhat is it?", "Noise.")),
]


def _write_json(folder: Path, entries: list[Entry]) -> str:
    return _write_llava(folder / "data.json", entries)


def _write_jsonl(folder: Path, entries: list[Entry]) -> str:
    return _write_llava(folder / "data.jsonl", entries)


def _write_llava(file: Path, entries: list[Entry]) -> str:
    rows: list[dict[str, Any]] = []
    for number, (name, images, turns) in enumerate(entries):
        paths = [f"images/{number}-{i}.img" for i in range(len(images))]
        for path, data in zip(paths, images, strict=True):
            (file.parent / path).parent.mkdir(exist_ok=True)
            (file.parent / path).write_bytes(data)
        row: dict[str, Any] = {"id": name, "conversations": turns}
        if paths:
            row["image"] = paths[0] if len(paths) == 1 else paths
        rows.append(row)
    lines = "\n\n".join(json.dumps(row) for row in rows)
    file.write_text(lines if file.suffix == ".jsonl" else json.dumps(rows))
    return str(file)


def _write_tar(folder: Path, entries: list[Entry]) -> str:
    for shard, part in enumerate((entries[:2], entries[2:])):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for number, (name, images, turns) in enumerate(part):
                members = {"json": json.dumps({"id": name, "conversations": turns}).encode()}
                for i, data in enumerate(images):
                    members["JPG" if len(images) == 1 else f"image{i}.png"] = data
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"v1.0/s{number}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return str(folder / "{000..001}.tar")


def _write_parquet(folder: Path, entries: list[Entry]) -> str:
    for shard, part in enumerate((entries[:2], entries[2:])):
        rows = [
            {
                "id": name,
                "images": [{"bytes": data, "path": None} for data in images],
                "conversations": turns,
                "unused": 1.0,
            }
            for name, images, turns in part
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard}.parquet", row_group_size=1)
    return str(folder)


Writer = Callable[[Path, list[Entry]], str]
WRITERS: list[Writer] = [_write_json, _write_jsonl, _write_tar, _write_parquet]
every_kind = pytest.mark.parametrize("write", WRITERS)


def _open(path: str, **settings: Any) -> SampleSource:
    return open_source(SourceConfig(path=path, **settings))


def _expected(entry: Entry) -> Sample:
    name, images, turns = entry
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = [Message(role=roles[t["from"]], text=t["value"]) for t in turns]  # pyright: ignore[reportArgumentType]
    return Sample(
        key=sample_key(images, messages),
        source_id=name,
        images=tuple(images),
        messages=tuple(messages),
    )


@every_kind
def test_every_kind_gives_the_same_samples_in_any_order(write: Writer, tmp_path: Path) -> None:
    source = _open(write(tmp_path, ENTRIES))
    assert len(source) == len(ENTRIES)
    for index in (4, 0, 3, 2, 1, 2):
        assert source[index] == _expected(ENTRIES[index])


@every_kind
def test_scan_keeps_identical_samples_apart_and_reports_progress(
    write: Writer, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    source = _open(write(tmp_path, ENTRIES))
    found, rejected = scan(source, lambda _, done, total: seen.append((done, total)))
    assert not rejected
    assert seen == [(n, 5) for n in range(1, 6)]
    assert [sample.index for sample in found] == [0, 1, 2, 3, 4]
    assert found[4].key == found[0].key + "-1"
    assert len({sample.key for sample in found}) == 5
    assert scan(source) == (found, [])


def test_scan_tells_which_samples_show_the_same_images(tmp_path: Path) -> None:
    turns = _turns("<image> what?", "this")
    both = _turns("<image> and <image>?", "those")
    entries = [
        ("a", [_image(1)], turns),
        ("b", [_image(1)], _turns("so <image>?", "no")),
        ("c", [_image(2)], turns),
        ("d", [], _turns("what?", "that")),
        ("e", [_image(1), _image(2)], both),
        ("f", [_image(2), _image(1)], both),
    ]
    found, _ = scan(_open(_write_json(tmp_path, entries)))
    shown = [sample.images for sample in found]
    assert shown[0] == shown[1]
    assert shown[3] is None
    assert len({*shown}) == 5


@every_kind
def test_limit_cuts_the_source(write: Writer, tmp_path: Path) -> None:
    path = write(tmp_path, ENTRIES)
    source = _open(path, limit=3)
    assert len(source) == 3
    assert source[2] == _expected(ENTRIES[2])
    with pytest.raises(IndexError):
        source[3]
    assert len(_open(path, limit=50)) == 5
    with pytest.raises(ValueError, match="limit must be >= 1"):
        _open(path, limit=0)


BROKEN: list[tuple[str, list[bytes], list[dict[str, str]], str]] = [
    ("cut png", [_image(1)[:-200]], _turns("<image>", "x"), "image 0 .* cannot be decoded"),
    ("cut jpeg", [_image(1, "JPEG")[:-200]], _turns("<image>", "x"), "truncated"),
    ("not an image", [b"hello"], _turns("<image>", "x"), "cannot be decoded"),
    ("no placeholder", [_image(1)], _turns("What?", "x"), "0 <image> placeholders for 1 images"),
    ("no image", [], _turns("<image>", "x"), "1 <image> placeholders for 0 images"),
    ("role", [], [{"from": "robot", "value": "x"}], "role 'robot', expected one of human"),
    ("order", [], _turns("x", "y", "z", "a")[1:], "ending with assistant"),
]


@every_kind
@pytest.mark.parametrize(("name", "images", "turns", "reason"), BROKEN)
def test_a_bad_sample_is_refused_by_name_and_the_others_are_kept(
    write: Writer,
    name: str,
    images: list[bytes],
    turns: list[dict[str, str]],
    reason: str,
    tmp_path: Path,
) -> None:
    path = write(tmp_path, [ENTRIES[0], (name, images, turns), ENTRIES[3]])
    source = _open(path)
    with pytest.raises(SampleError, match=reason) as error:
        source[1]
    assert name in str(error.value)
    assert str(tmp_path) in str(error.value)
    found, rejected = scan(source)
    assert [sample.index for sample in found] == [0, 2]
    assert [(r.key, r.source_id) for r in rejected] == [("index-1", name)]


def test_a_missing_image_names_file_and_remedy(tmp_path: Path) -> None:
    path = _write_json(tmp_path, ENTRIES[:1])
    with pytest.raises(SampleError, match=r"data.json, entry 0.*elsewhere/images/0-0.img.*set it"):
        _open(path, image_root=tmp_path / "elsewhere")[0]


def test_image_paths_are_relative_to_the_image_root(tmp_path: Path) -> None:
    path = _write_json(tmp_path, ENTRIES[:1])
    (tmp_path / "images").rename(tmp_path / "moved")
    (tmp_path / "root").mkdir()
    (tmp_path / "moved").rename(tmp_path / "root" / "images")
    assert _open(path, image_root=tmp_path / "root")[0] == _expected(ENTRIES[0])


def test_an_image_field_of_another_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([{"image": 3, "conversations": []}]))
    with pytest.raises(SampleError, match="a path or a list of paths, found 3"):
        _open(str(tmp_path / "data.json"))[0]


def test_a_broken_line_rejects_one_sample_of_a_jsonl(tmp_path: Path) -> None:
    path = _write_jsonl(tmp_path, ENTRIES[:1])
    with open(path, "a") as file:
        file.write("\n{oops\n[]\n")
    found, rejected = scan(_open(path))
    assert len(found) == 1
    assert "line 2: not valid JSON" in rejected[0].reason
    assert "line 3: expected a JSON object, found list" in rejected[1].reason


def test_messages_with_parts_are_read_as_placeholders_and_text(tmp_path: Path) -> None:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    (tmp_path / "i.png").write_bytes(_image(1))
    entry = {
        "image": "i.png",
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": "Noise."}]},
        ],
    }
    (tmp_path / "data.json").write_text(json.dumps([entry]))
    sample = _open(str(tmp_path / "data.json"))[0]
    assert [m.text for m in sample.messages] == ["<image>What?", "Noise."]
    assert sample.source_id == "data.json:0"


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("a.json", b"[{", "not valid JSON"),
        ("a.json", b'{"a": 1}', "expected a JSON list of entries, found dict"),
        ("a.json", b"[]", "holds no samples"),
        ("a.jsonl", b"\n", "holds no samples"),
        ("a.tar", b"no tar at all", "cannot be read as an uncompressed tar"),
        ("a.parquet", b"no parquet", "cannot be read as Parquet"),
        ("a.csv", b"", "unknown kind of source"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    file: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        _open(str(tmp_path / file))
    assert file in str(error.value)


@pytest.mark.parametrize("file", ["a.json", "a.jsonl", "{0..3}.tar", "a.parquet", "a-*.parquet"])
def test_a_missing_file_is_refused(file: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="check the path"):
        _open(str(tmp_path / file))


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        _open(str(tmp_path / "nowhere"))


def test_image_root_is_refused_where_it_would_be_ignored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_root was given"):
        _open(_write_tar(tmp_path, ENTRIES), image_root=tmp_path)


def test_a_parquet_file_without_turns_names_the_missing_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "headline": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="image, headline, expected one named conversations, mes"):
        _open(str(tmp_path / "a.parquet"))


def test_a_parquet_image_that_is_only_a_path_is_refused(tmp_path: Path) -> None:
    row = {"image": {"bytes": None, "path": "a.png"}, "conversations": _turns("<image>", "x")}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(SampleError, match="embed the image files"):
        _open(str(tmp_path / "a.parquet"))[0]


def test_a_parquet_pattern_picks_one_split(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "test-0"):
        table = pa.Table.from_pylist([{"id": name, "conversations": _turns("a", "b")}])
        pq.write_table(table, tmp_path / f"{name}.parquet")
    source = _open(str(tmp_path / "train-*.parquet"))
    assert [source[i].source_id for i in range(len(source))] == ["train-0", "train-1"]


def test_a_tar_sample_without_json_is_refused_by_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("alone.png")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(SampleError, match=r"a.tar, member alone: found png, expected a json"):
        _open(str(tmp_path / "a.tar"))[0]


def test_keys_depend_on_content_alone(tmp_path: Path) -> None:
    sample = _expected(ENTRIES[0])
    (tmp_path / "x").mkdir()
    renamed = ("other", *ENTRIES[0][1:])
    other = _open(_write_json(tmp_path / "x", [renamed]))[0]
    assert other.key == sample.key
    assert other == dataclasses.replace(sample, source_id="other")
