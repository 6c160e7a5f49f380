"""docs/reliability.md names tests that exist, one at least for each of its rows."""

import re

from tests.support.paths import DOCS, TESTS

ROWS = [
    line
    for line in (DOCS / "reliability.md").read_text().splitlines()
    if re.match(r"\| \d+ \|", line)
]


def test_there_are_the_rows_that_a_cache_is_held_to() -> None:
    assert [int(line.split("|")[1]) for line in ROWS] == list(range(1, 31))


def test_every_test_that_is_named_exists() -> None:
    for line in ROWS:
        named = re.findall(r"`([a-z_/]+\.py)::(test_[a-z0-9_]+)`", line)
        assert named, line
        for file, name in named:
            assert f"\ndef {name}(" in (TESTS / file).read_text(), f"{file}::{name}"
