"""Refusals of a sample name the true cause, and following the message makes it readable."""

import base64
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.build import SourceConfig
from pipeline.sources.source import open_source, scan
from teacher_cache.schema.errors import SampleError
from tests.pipeline.sources.test_media import SHOWN, TURNS, json_source, picture, write_tar

Json = dict[str, Any]


def user(content: Any, **more: Any) -> list[Json]:
    return [{"role": "user", "content": content, **more}, {"role": "assistant", "content": "x"}]


def test_a_mark_without_image_names_the_field_that_may_hold_it(tmp_path: Path) -> None:
    """More marks than images alone would send a reader to the text, where nothing is wrong."""
    entry = {"conversations": SHOWN, "image_path": "0.png"}
    with pytest.raises(SampleError, match=r"1 <image> placeholders for 0 .*not read: image_path"):
        json_source(tmp_path, entry)[0]
    entry["image"] = entry.pop("image_path")
    assert json_source(tmp_path, entry)[0].images == (picture(0),)


def test_a_caption_without_image_names_the_field_that_may_hold_it(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=r"caption without an image .*not read: image_url; if"):
        json_source(tmp_path, {"caption": "x", "image_url": "0.png"})[0]
    assert json_source(tmp_path, {"caption": "x", "image": "0.png"})[0].images == (picture(0),)


def test_an_image_without_mark_is_read_once_it_is_marked(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=r"0 <image> .* for 1 images; write one <image> in the"):
        json_source(tmp_path, {"conversations": TURNS, "image": "0.png"})[0]
    assert json_source(tmp_path, {"conversations": SHOWN, "image": "0.png"})[0].images


@pytest.mark.parametrize(
    ("messages", "name"),
    [
        (user("What?", image="0.png"), "image of a turn"),
        (user("What?", images=["0.png"]), "images of a turn"),
        (user([{"type": "text", "text": "a", "image": "0.png"}]), "image of a text part"),
    ],
)
def test_media_of_a_turn_is_named(
    messages: list[Json], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SampleError, match=f"it has no image, but {name}, which is not read"):
        json_source(tmp_path, {"messages": messages})[0]
    first = {"role": "user", "content": [{"type": "image"}]}
    shown = [first, {"role": "assistant", "content": "y"}, *messages]
    with caplog.at_level(logging.WARNING):
        found, _ = scan(json_source(tmp_path, {"image": "0.png", "messages": shown}))
    assert len(found) == 1
    assert f"{name} (1)" in caplog.messages[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("meta", {"image": "a"}),
        ("extra", [{"file": "a.jpg"}]),
        ("pixel_values", [[0, 1], [1, 0]]),
        ("depth", [[0.5]]),
    ],
)
def test_nested_media_is_named(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=f"it has no image, but {name}, which"):
        json_source(tmp_path, {"conversations": TURNS, name: value})[0]


def test_a_number_is_no_depth_map(tmp_path: Path) -> None:
    assert json_source(tmp_path, {"conversations": TURNS, "depth": 3, "meta": {"n": 1}})[0]


def test_tool_calls_are_refused(tmp_path: Path) -> None:
    messages = user("a")
    messages[1]["tool_calls"] = [{"name": "f"}]
    with pytest.raises(SampleError, match="turn 1 holds tool_calls; tool calls are not read"):
        json_source(tmp_path, {"messages": messages})[0]


def test_preference_pairs_are_refused_in_json_and_parquet(tmp_path: Path) -> None:
    entry = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(SampleError, match="found chosen and rejected; preference pairs"):
        json_source(tmp_path, entry)[0]
    pq.write_table(pa.Table.from_pylist([entry]), tmp_path / "a.parquet")
    with pytest.raises(SampleError, match="found chosen and rejected; preference pairs"):
        open_source(SourceConfig(path=str(tmp_path / "a.parquet")))[0]
    assert json_source(tmp_path, {"prompt": "a", "completion": "b"})[0]


def test_a_pair_without_answer_is_a_refused_sample(tmp_path: Path) -> None:
    source = json_source(tmp_path, {"texts": [{"user": "a"}]})
    assert "its last question has no answer" in scan(source)[1][0].reason


def test_base64_without_a_head_is_refused_in_few_characters(tmp_path: Path) -> None:
    text = base64.b64encode(picture() * 20).decode()
    with pytest.raises(SampleError, match="write `data:image/png;base64,` in front") as error:
        json_source(tmp_path, {"conversations": SHOWN, "image": text})[0]
    assert len(str(error.value)) < 500
    data_url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    assert json_source(tmp_path, {"conversations": SHOWN, "image": data_url})[0].images


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(picture(7))
    url = (tmp_path / "a b.png").as_uri()
    assert "%20" in url
    assert json_source(tmp_path, {"conversations": SHOWN, "image": url})[0].images == (picture(7),)


def test_a_mask_beside_an_image_is_no_second_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the text marks its images, all members are read, and their number is checked."""
    two = [{"from": "human", "value": "<image><image>"}, TURNS[1]]
    members = {"a.jpg": picture(1), "a.mask.png": picture(2), "a.txt": b"A square."}
    marked = {"b.jpg": picture(1), "b.mask.png": picture(2), "b.json": json.dumps(two).encode()}
    source = open_source(SourceConfig(path=write_tar(tmp_path / "a.tar", {**members, **marked})))
    assert source[0].images == (picture(1),)
    assert source[1].images == (picture(1), picture(2))
    scan(source)
    assert "mask.png (1)" in caplog.messages[0]


def test_a_caption_that_is_not_utf8_is_one_rejected_sample(tmp_path: Path) -> None:
    members = {"a.jpg": picture(), "a.txt": b"\xff", "b.jpg": picture(), "b.txt": b"A square."}
    source = open_source(SourceConfig(path=write_tar(tmp_path / "a.tar", members)))
    found, rejected = scan(source)
    assert [sample.index for sample in found] == [1]
    assert "member a.txt: not UTF-8" in rejected[0].reason


def test_a_path_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "[v1]").mkdir()
    assert len(json_source(tmp_path / "[v1]", {"conversations": TURNS})) == 1


def test_a_folder_of_two_kinds_is_refused_and_a_pattern_chooses(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"conversations": TURNS}]), tmp_path / "a.parquet")
    write_tar(tmp_path / "a.tar", {"a.json": json.dumps(TURNS).encode()})
    with pytest.raises(ValueError, match=r"holds \*.parquet and \*.tar; name one of them"):
        open_source(SourceConfig(path=str(tmp_path)))
    assert len(open_source(SourceConfig(path=str(tmp_path / "*.tar")))) == 1
