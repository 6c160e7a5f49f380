"""Fixtures shared by all tests: small real models, built once per session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import FAMILIES

TinyFolder = Callable[[str], Path]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """Folder of the tiny model of a family, by model type."""
    built: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in built:
            built[family] = FAMILIES[family](tmp_path_factory.mktemp(family))
        return built[family]

    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what exhaustive tests say they have tried: record_property("tried", ...)."""
    reports = terminalreporter.getreports("passed")
    tried = [
        value for report in reports for name, value in report.user_properties if name == "tried"
    ]
    if tried:
        terminalreporter.section("tried")
    for line in sorted(set(map(str, tried))):
        terminalreporter.write_line(line)
