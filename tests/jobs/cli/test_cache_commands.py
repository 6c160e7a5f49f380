"""Promises of cli/cache_commands.py: what is asked of a cache is printed, problems exit with 3."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.cli.__main__ import main
from teacher_cache.schema.options import RecordSettings
from teacher_cache.teacher.teacher import Teacher
from tests.support.caches import build_cache
from tests.support.tiny import tiny_llava, tiny_samples

Run = pytest.CaptureFixture[str]


def _cache(folder: Path, model: Path) -> str:
    settings = RecordSettings(records="topk", top_k=4)
    teacher = Teacher.load(str(model), device="cpu")
    build_cache(folder, teacher, tiny_samples(5), settings, samples_per_shard=3)
    return str(folder)


def _json(arguments: Sequence[str], captured: Run, code: int = 0) -> Any:
    captured.readouterr()
    assert main([*arguments, "--json"]) == code
    return json.loads(captured.readouterr().out)


def test_a_cache_is_verified_against_its_teacher(tmp_path: Path, llava: Path, capsys: Run) -> None:
    cache = _cache(tmp_path / "cache", llava)
    again = ["verify", cache, "--teacher", str(llava), "--samples", "2", "--device", "cpu"]
    assert main(again) == 0
    said = capsys.readouterr().out
    assert "no problem found" in said
    assert "vision logits" in said
    report = _json(again, capsys)
    assert report["problems"] == report["teacher"]["problems"] == []
    assert report["teacher"]["samples"] in (2, 3)
    other = tiny_llava(tmp_path / "other", seed=1)
    report = _json(["verify", cache, "--teacher", str(other)], capsys, code=3)
    assert [field for field, _, _ in report["teacher"]["other_teacher"]] == ["teacher_weights"]
    assert main(["verify", cache, "--teacher", str(other)]) == 3
    assert "PROBLEM" in capsys.readouterr().out


def test_a_sample_is_shown_in_words_and_drawn(tmp_path: Path, llava: Path, capsys: Run) -> None:
    cache = _cache(tmp_path / "cache", llava)
    key = tiny_samples(1)[0].key
    picture = tmp_path / "sample.png"
    words = ["--tokenizer", str(llava), "--picture", str(picture)]
    shown = _json(["inspect", cache, "--sample", key, *words], capsys)
    assert all(isinstance(token, str) for token in shown["response"])
    assert shown["picture"] == str(picture)
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
    assert main(["inspect", cache, *words]) == 2
    assert "name it by --sample" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1"])
def test_a_comparison_of_nothing_does_not_pass(
    count: str, tmp_path: Path, llava: Path, capsys: Run
) -> None:
    cache = _cache(tmp_path / "cache", llava)
    assert main(["verify", cache, "--teacher", str(llava), "--samples", count]) == 2
    assert f"samples is {count}, expected at least 1" in capsys.readouterr().err
