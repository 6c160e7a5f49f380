"""Promises of jobs/cli/derive_commands.py: flags choose, a sealed cache is left and told of."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.__main__ import main
from teacher_cache.folder.reader import CacheReader
from tests.support.builders import published
from tests.support.derived import base_cache
from tests.support.extended import build_config, built

Run = pytest.CaptureFixture[str]


def _json(arguments: Sequence[str], captured: Run) -> Any:
    captured.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(captured.readouterr().out)


def test_a_part_the_rest_and_both_again(tmp_path: Path, capsys: Run) -> None:
    base = base_cache(tmp_path / "a")
    keys = CacheReader.open(tmp_path / "a").keys
    a, part, rest, both = (str(tmp_path / name) for name in ("a", "part", "rest", "both"))
    for name, chosen in (("some", keys[:3]), ("others", keys[3:])):
        (tmp_path / name).write_text("\n".join(chosen) + "\n")
    told = _json(["subset", a, "--out", part, "--keys", str(tmp_path / "some")], capsys)
    assert (told["samples"], told["format"], told["cache"]) == (3, "arrow", part)
    others = ["--keys", str(tmp_path / "others"), "--samples-per-shard", "4"]
    assert main(["subset", a, "--out", rest, *others, "--format", "webdataset"]) == 0
    assert "7 samples in 2 webdataset shards" in capsys.readouterr().out
    assert _json(["merge", part, rest, "--out", both], capsys)["samples"] == 10
    assert main(["verify", both]) == 0
    assert set(CacheReader.open(both).keys) == set(keys)
    assert main(["merge", a, both, "--out", str(tmp_path / "m")]) == 2
    assert "10 samples are in several of the caches" in capsys.readouterr().err
    told = _json(
        ["merge", a, both, "--out", str(tmp_path / "m"), "--on-duplicate", "first"], capsys
    )
    assert (told["samples"], told["shards"]) == (10, len(base.seal.shards))


def test_predicates_are_flags(tmp_path: Path, capsys: Run) -> None:
    base_cache(tmp_path / "a")
    flags = ["--min-response-tokens", "2", "--max-vision-tokens", "4", "--fraction", "0.5"]
    out = str(tmp_path / "s")
    told = _json(["subset", str(tmp_path / "a"), "--out", out, *flags, "--seed", "3"], capsys)
    assert 0 < told["samples"] < 10
    assert main(["subset", str(tmp_path / "a"), "--out", out, "--fraction", "2"]) == 2
    assert "fraction is 2" in capsys.readouterr().err


def test_there_and_back(tmp_path: Path, capsys: Run) -> None:
    base = base_cache(tmp_path / "a")
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    told = _json(["export", str(tmp_path / "a"), "--out", there, "--format", "webdataset"], capsys)
    assert told["fingerprint"] == base.seal.fingerprint
    assert main(["export", there, "--out", back, "--format", "arrow"]) == 0
    assert published(Path(back)) == published(tmp_path / "a")


def test_a_cache_is_extended_by_samples_and_by_records(
    tmp_path: Path, llava: Path, capsys: Run
) -> None:
    base = str(built(tmp_path, llava, "topk"))
    source = build_config(tmp_path, llava, "topk", 9).source.path
    teacher = ["--teacher", str(llava), "--device", "cpu"]
    here = [*teacher, "--no-ray"]
    more, both = str(tmp_path / "more"), str(tmp_path / "both")
    told = _json(["extend", "--cache", base, "--out", more, "--source", source, *here], capsys)
    assert told["samples"] == 9
    records = ["--records", "hidden", "--hidden-dtype", "float32"]
    assert main(["extend", "--cache", more, "--out", both, *records, *here]) == 0
    assert "9 samples" in capsys.readouterr().out
    assert CacheReader.open(both).spec.records == "topk+hidden"
    assert main(["verify", both, *teacher]) == 0
    assert main(["extend", "--cache", more, "--out", both, *teacher]) == 2
    assert "give either source" in capsys.readouterr().err


def test_keys_are_text_of_any_editor(tmp_path: Path, capsys: Run) -> None:
    base_cache(tmp_path / "a")
    keys = CacheReader.open(tmp_path / "a").keys
    file = tmp_path / "keys"
    subset = ["subset", str(tmp_path / "a"), "--out", str(tmp_path / "s"), "--keys", str(file)]
    assert main(subset) == 2
    assert f"--keys {file} cannot be read" in capsys.readouterr().err
    file.write_bytes(b"\xff\xfe\xa4")
    assert main(subset) == 2
    assert "give a text file with one key a line" in capsys.readouterr().err
    file.write_text(
        f"{keys[0]}\r\n\r\n{keys[1]}\r\n{keys[0]}\r\n", encoding="utf-8-sig", newline=""
    )
    assert _json(subset, capsys)["samples"] == 2
