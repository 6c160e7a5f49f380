"""What comes from data cannot move the cursor, forge a line or fail to print."""

import json
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from jobs.cli import stage_commands
from jobs.cli.__main__ import main
from jobs.cli.output import EscapingFormatter, echo, warn
from pipeline.config.build import SourceConfig
from pipeline.sources.source import open_source, refuse_samples, scan, warn_unread
from teacher_cache.schema.errors import SampleError, printable

HOSTILE = "a\x1b[2Jb\nc\rd\u202ee\u200bf\x00g\x7fh\x9bi\u2028j"
ESCAPED = r"a\x1b[2Jb\nc\rd\u202ee\u200bf\x00g\x7fh\x9bi\u2028j"


def test_every_control_and_direction_character_is_escaped() -> None:
    assert printable(HOSTILE) == ESCAPED
    assert printable("\ud800") == r"\ud800"
    for text in ("", "plain", "gr\u00fc\u00df", "\u4f60\u597d", "\U0001f600", "a b"):
        assert printable(text) == text
    assert all(printable(chr(code)).isprintable() for code in range(0x3000))


def test_answers_warnings_and_logs_keep_lines_and_escape_the_rest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    echo("one\n\ttwo \x1b[31m")
    warn("three \u202e\n")
    captured = capsys.readouterr()
    assert captured.out == "one\n\ttwo \\x1b[31m\n"
    assert captured.err == "three \\u202e\n\n"
    record = logging.LogRecord("a", logging.WARNING, "f", 1, "found %s", ("\x1b]0;x\x07",), None)
    assert EscapingFormatter("%(message)s").format(record) == r"found \x1b]0;x\x07"


def test_a_sample_with_a_hostile_name_is_one_line_of_a_refusal(tmp_path: Path) -> None:
    entry = {"id": HOSTILE, "image": f"{HOSTILE[:-9]}.png", "caption": "x"}
    (tmp_path / "a.jsonl").write_text(json.dumps(entry) + "\n")
    _, rejected = scan(open_source(SourceConfig(path=str(tmp_path / "a.jsonl"))))
    with pytest.raises(ValueError, match="1 samples cannot be used") as caught:
        refuse_samples("a", [f"{each.source_id}: {each.reason}" for each in rejected], "Fix.")
    first, line, last = str(caught.value).split("\n")
    assert ESCAPED in line
    assert first.isprintable()
    assert last == "Fix."
    assert str(SampleError(HOSTILE, HOSTILE)).isprintable()


def test_names_of_unread_fields_are_escaped_in_the_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_unread("a", Counter({"\x1b[2J": 1}))
    assert r"\x1b[2J (1)" in caplog.messages[0]


def _exhaust_torch() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def _exhaust(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("exhaust", "text"),
    [
        (partial(_exhaust, MemoryError()), ""),
        (partial(_exhaust, MemoryError("Unable to allocate 9 GiB")), "Unable to allocate 9 GiB"),
        (partial(_exhaust, torch.OutOfMemoryError("CUDA out of memory")), "CUDA out of memory"),
        (_exhaust_torch, "can't allocate memory"),
    ],
)
def test_a_lack_of_memory_is_one_message(
    exhaust: Callable[[], None],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> int:
        exhaust()
        return 0

    monkeypatch.delenv("EMKD_DEBUG", raising=False)
    monkeypatch.setattr(stage_commands.Plan, "__call__", fail)
    assert main(["plan"]) == 2
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("emkd plan: there is not enough memory")
    assert text in line
