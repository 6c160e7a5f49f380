"""docs/first_hour.md works: its scripts and commands run in order, on a tiny teacher."""

import re
import shlex
from pathlib import Path

import pytest

from jobs.cli.__main__ import main
from teacher_cache.folder.reader import CacheReader
from tests.support.paths import DOCS
from tests.support.tiny import tiny_image

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (DOCS / "first_hour.md").read_text(), re.M | re.S)


def _arguments(line: str) -> list[str]:
    """The words of a command, as a shell would give them."""
    words = shlex.split(line)
    if "KEY" in words:
        words[words.index("KEY")] = CacheReader.open("cache/ten").keys[0]
    found = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in words]
    return [word for each in found for word in each]


@pytest.mark.timeout(300)  # ten commands, each of which is a stage
def test_every_command_works_in_the_order_of_the_page(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "teacher").mkdir(parents=True)
    (tmp_path / "demo" / "teacher" / "final").symlink_to(llava)
    (tmp_path / "mine").mkdir()
    for number in range(10):
        (tmp_path / "mine" / f"{number}.png").write_bytes(tiny_image(number))
    ran: list[str] = []
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "first_hour.md", "exec"), {})
            continue
        short = block.replace("--max-steps 20", "--max-steps 2")
        for line in short.replace("\\\n", "").splitlines():
            if line == "make demo":
                continue
            program, command, *rest = _arguments(line)
            assert program == "emkd"
            assert main([command, *rest]) == 0, line
            ran.append(command)
    commands = "plan build verify inspect inspect train train evaluate evaluate report"
    assert " ".join(ran) == commands
    assert "emkd-0" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "sample.png").stat().st_size > 0
