"""docs/data.md: every example is read as the page says, from JSON, JSON lines, Parquet and tars."""

import base64
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.build import SourceConfig
from pipeline.sources.source import open_source, scan
from teacher_cache.schema.samples import Sample

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
EXAMPLES = [
    (json.loads(entry), said.splitlines())
    for entry, said in re.findall(r"```json\n(.*?)```\n```text\n(.*?)```", PAGE, re.DOTALL)
]
COLOURS = {"a.png": (200, 0, 0), "b.png": (0, 0, 200)}


def picture(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), COLOURS[name]).save(buffer, "PNG")
    return buffer.getvalue()


def said_of(sample: Sample) -> list[str]:
    """A sample as the page writes it."""
    lines = [
        f"{m.role}{'' if m.learn else ', not learnt'}: " + m.text.replace("\n", "\\n")
        for m in sample.messages
    ]
    lists = {"references": sample.references, "choices": sample.choices}
    lines += [f"{name}: {' | '.join(values)}" for name, values in lists.items() if values]
    return lines + ([f"category: {sample.category}"] if sample.category else [])


def write_json(folder: Path, entry: dict[str, Any]) -> Path:
    for name in COLOURS:
        (folder / name).write_bytes(picture(name))
    (folder / "data.json").write_text(json.dumps([entry]))
    return folder / "data.json"


def write_lines(folder: Path, entry: dict[str, Any]) -> Path:
    write_json(folder, entry)
    (folder / "data.jsonl").write_text(json.dumps(entry) + "\n")
    return folder / "data.jsonl"


def embedded(value: Any) -> Any:
    """The entry with bytes in place of paths."""
    if isinstance(value, dict):
        return {k: embedded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [embedded(each) for each in value]
    if value in COLOURS:
        return {"bytes": picture(value), "path": value}
    return value


def write_parquet(folder: Path, entry: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist([embedded(entry)]), folder / "data.parquet")
    return folder / "data.parquet"


def write_tar(folder: Path, entry: dict[str, Any]) -> Path:
    """The images of the entry's field as members, and its texts as JSON."""
    names = entry.get("images") or ([entry["image"]] if "image" in entry else [])
    members = {f"k.{i}.png": picture(name) for i, name in enumerate(names)}
    members["k.json"] = json.dumps(entry).encode()
    with tarfile.open(folder / "data.tar", "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return folder / "data.tar"


def as_data_urls(entry: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(entry)
    for name in COLOURS:
        link = "data:image/png;base64," + base64.b64encode(picture(name)).decode()
        text = text.replace(f'"{name}"', json.dumps(link))
    return json.loads(text)


# A tar's images are members, and Arrow has no list of parts of unlike forms.
CASES = [
    (write, entry, said)
    for write in (write_json, write_lines, write_parquet, write_tar)
    for entry, said in EXAMPLES
    if write in (write_json, write_lines) or '"type": "image", "image"' not in json.dumps(entry)
]


@pytest.mark.parametrize(("write", "entry", "said"), CASES)
def test_every_example_is_read_as_the_page_says(
    write: Callable[[Path, dict[str, Any]], Path],
    entry: dict[str, Any],
    said: list[str],
    tmp_path: Path,
) -> None:
    source = open_source(SourceConfig(path=str(write(tmp_path, entry))))
    sample = source[0]
    wanted = [line for line in said if not line.startswith("images: ")]
    assert said_of(sample) == wanted
    order = [line for line in said if line.startswith("images: ")]
    fields = entry.get("images") or ([entry["image"]] if "image" in entry else [])
    names = order[0].split()[1:] if order else fields
    assert sample.images == tuple(picture(name) for name in names)
    assert not source.unread
    found, rejected = scan(source)
    assert bool(found) == (sample.messages[-1].role == "assistant")
    assert len(found) + len(rejected) == 1


@pytest.mark.parametrize(("entry", "said"), EXAMPLES)
def test_data_urls_are_the_same_images(
    entry: dict[str, Any], said: list[str], tmp_path: Path
) -> None:
    by_path = open_source(SourceConfig(path=str(write_json(tmp_path, entry))))[0]
    (tmp_path / "urls").mkdir()
    links = write_json(tmp_path / "urls", as_data_urls(entry))
    assert open_source(SourceConfig(path=str(links)))[0] == by_path
    assert said


def test_the_imagefolder_is_read_as_the_page_says(tmp_path: Path) -> None:
    (lines,) = re.findall(r"```jsonl\n(.*?)```", PAGE, re.DOTALL)
    for name in COLOURS:
        (tmp_path / name).write_bytes(picture(name))
    (tmp_path / "metadata.jsonl").write_text(lines)
    samples = list(map(open_source(SourceConfig(path=str(tmp_path))).__getitem__, (0, 1)))
    assert [sample.images for sample in samples] == [(picture("a.png"),), (picture("b.png"),)]
    assert [sample.messages[1].text for sample in samples] == ["A red square.", "blue"]


def test_the_page_has_all_layouts() -> None:
    assert len(EXAMPLES) >= 12
