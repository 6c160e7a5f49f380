"""README's first screen is true: its example runs, its map shows every room, it stays short."""

import re
from pathlib import Path

import pytest
import torch

from teacher_cache.schema.options import RecordSettings
from teacher_cache.teacher.teacher import Teacher
from tests.support.caches import build_cache
from tests.support.lazy import student_from_vanilla
from tests.support.paths import DOCS, ROOT
from tests.support.tiny import tiny_samples
from tests.whole.test_architecture import PACKAGES

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)


def test_the_example_runs_on_what_the_demo_leaves(
    llava: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (example,) = (text for language, text in BLOCKS if language == "python")
    teacher = Teacher.load(str(llava), device="cpu", dtype="float32")
    records = RecordSettings(records="topk+sketch", top_k=16, sketch_rank=8)
    build_cache(tmp_path / "demo" / "cache", teacher, tiny_samples(4), records)
    for part in student_from_vanilla(str(llava), stride=2, dtype=torch.float32):
        part.save_pretrained(tmp_path / "demo" / "runs" / "emkd-0" / "final")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    terms = capsys.readouterr().out.splitlines()[-1]
    assert re.findall(r"'(\w+)': \d", terms) == ["supervised", "rld", "vsd", "vlad"]


def rooms() -> set[str]:
    """Every sub-package of the product, as `package/room`."""
    inits = [file for package in PACKAGES for file in (ROOT / package).glob("*/__init__.py")]
    return {str(file.parent.relative_to(ROOT)) for file in inits}


def test_its_map_shows_every_room_and_no_other() -> None:
    shown: set[str] = set()
    package = ""
    (block,) = (text for language, text in BLOCKS if not language and "jobs/" in text)
    for line in block.splitlines():
        names = re.match(r" *((?:[a-z_]+/ ?)+)", line)
        assert names is not None, line
        found = [name.rstrip("/") for name in names[1].split()]
        if line.startswith(" "):
            shown |= {f"{package}/{name}" for name in found}
        else:
            (package,) = found
    assert shown == rooms()


def test_architecture_md_gives_every_room_a_sentence() -> None:
    rows = re.findall(
        r"^\| `([a-z_]+/[a-z_]+)/` \| \w", (DOCS / "architecture.md").read_text(), re.M
    )
    assert sorted(rows) == sorted(rooms())


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 140
