"""Flags that take a folder refuse URLs; only caches may lie in an object store."""

from pathlib import Path

import pytest

from jobs.cli.__main__ import main


@pytest.mark.parametrize(
    "line",
    [
        "train --cache c --student s --out s3://bucket/run",
        "evaluate --model m --source x.json --out gs://bucket/eval",
        "report runs/a --out s3://bucket/report.html",
        "report s3://bucket/run",
        "build --source x.json --teacher t --out c --image-root s3://bucket/images",
        "demo --out s3://bucket/demo",
    ],
)
def test_a_url_where_none_is_supported_is_refused_before_anything_is_written(
    line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    assert "looks like a URL; give a folder or file on this machine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("build --source https://x/a.tar --teacher t --out c", "not from URLs; download it"),
        ("evaluate --model m --source s3://b/x.json --out e", "not from URLs; download it"),
        ("train --config s3://b/c.json", "--config s3://b/c.json is a URL; download it"),
    ],
)
def test_a_source_or_config_at_a_url_is_refused_before_anything_is_written(
    line: str,
    reason: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
