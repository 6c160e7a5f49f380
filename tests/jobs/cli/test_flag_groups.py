"""Promises of a command's help: an example on top, required flags first, the others by subject."""

import inspect
import re
import shlex
from typing import Any

import pytest

from jobs.cli.__main__ import parse
from jobs.cli.stage_commands import defaults

COMMANDS = sorted(defaults())
BOX = "\u256d\u2500\u256e\u2502\u2570\u256f"
GROUPED = ("build", "evaluate", "extend", "plan", "train")


def _help(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse([command, "--help"])
    return capsys.readouterr().out


def _example(command: str) -> str:
    text = inspect.cleandoc(type(defaults()[command]).__doc__ or "")
    (example,) = re.findall(r"^Example: emkd (.*)$", text, re.MULTILINE)
    return example


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_command_is_one(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = _example(command)
    words = shlex.split(example.split(" > ")[0])
    assert words[0] == command
    parse(words)
    shown = _help(command, capsys, monkeypatch)
    assert re.sub(r"\s+", " ", shown).index(example) < shown.index("options")


@pytest.mark.parametrize("command", GROUPED)
def test_required_flags_come_first_and_every_flag_has_a_group_and_a_help(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: dict[str, list[str]] = {}
    for line in _help(command, capsys, monkeypatch).splitlines():
        text = line.strip(f" {BOX}")
        # Where the terminal has no line-drawing letters, titles stand alone.
        if line.startswith(BOX[0]) or re.match(r" \w", line):
            groups[text] = []
        elif groups and text.strip("-"):
            groups[list(groups)[-1]].append(text)
    titles = list(groups)
    assert len(titles) >= 4
    without_subject = [line for line in groups["options"] if line.startswith("--")]
    assert not [flag for flag in without_subject if not flag.startswith("--json")]
    required = [title for title in titles if "(required)" in " ".join(groups[title])]
    assert required == ([] if command == "plan" else titles[1:2])
    texts = re.sub(r"\s+", " ", " ".join(" ".join(lines) for lines in groups.values()))
    names = r"--[a-z-]+(, --no-[a-z-]+)?"
    values = r"( (INT|STR|FLOAT|PATH|\[?\{[^}]*\}( \[\.\.\.\]\])?)[|\w{}]*)?"
    naked = re.search(rf"{names}{values} \((default|required)", texts)
    assert naked is None, naked.group(0)


def test_the_overview_has_one_line_for_each_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert "Example:" not in shown
    for command in COMMANDS:
        assert re.search(rf"{command} +\w", shown), command


def test_groups_change_no_value() -> None:
    line = (
        "train --cache c --student s --out o --seed 3 --batch-size 4 --device cpu "
        "--torch-threads 1 --stride 3 --max-steps 7 --objective rld"
    )
    parsed: Any = parse(shlex.split(line))
    config = parsed.config
    assert (config.cache, config.stride, config.torch_threads) == ("c", 3, 1)
    training = config.training
    assert (training.seed, training.batch_size, training.max_steps) == (3, 4, 7)
    assert (training.device, training.micro_batch_size) == ("cpu", None)
    assert training.objective.name == "rld"
