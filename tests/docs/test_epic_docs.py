"""docs/epic.md prints the numbers of the presets that the code has."""

import re

from student_train.config.schedules import PAPER_NOTES, RELEASED_CODE
from tests.support.paths import DOCS

PAGE = (DOCS / "epic.md").read_text()


def test_its_table_of_presets_is_the_code() -> None:
    for name, ramps in (("paper_notes", PAPER_NOTES), ("released_code", RELEASED_CODE)):
        (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| `{name}`"))
        numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", row)[:6]]
        of_code = [x for ramp in (ramps.low, ramps.high, ramps.gap) for x in (ramp.start, ramp.end)]
        assert numbers == of_code
