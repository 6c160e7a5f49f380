"""docs/epic.md names functions, files and numbers that exist."""

import importlib
import re

from student_train.config.schedules import PAPER_NOTES, RELEASED_CODE
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "epic.md").read_text()
MODULES = {file.stem for file in (ROOT / "student_train").glob("*.py")}


def test_every_function_it_names_exists() -> None:
    named = [found for found in re.findall(r"`(\w+)\.(\w+)`", PAGE) if found[0] in MODULES]
    assert len(named) > 20
    for module, name in named:
        assert hasattr(importlib.import_module(f"student_train.{module}"), name), (module, name)


def test_every_file_it_names_exists() -> None:
    known = {file.name for folder in ("tests", "docs") for file in (ROOT / folder).rglob("*.*")}
    for name in re.findall(r"`(?:tests/)?(\w+\.py)`", PAGE):
        assert name in known, name
    for name in re.findall(r"python -m benchmarks\.(\w+)", PAGE):
        assert (ROOT / "benchmarks" / f"{name}.py").exists()


def test_its_table_of_presets_is_the_code() -> None:
    for name, ramps in (("paper_notes", PAPER_NOTES), ("released_code", RELEASED_CODE)):
        (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| `{name}`"))
        numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", row)[:6]]
        of_code = [x for ramp in (ramps.low, ramps.high, ramps.gap) for x in (ramp.start, ramp.end)]
        assert numbers == of_code
