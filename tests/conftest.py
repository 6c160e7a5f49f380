"""Fixtures shared by all tests: small real models, built once per session."""

import gc
import os
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

# jaxtyping looks its type checker up among the loaded modules.
import tests.support.first_call  # noqa: F401  # pyright: ignore[reportUnusedImport]
from tests.support.paths import IN_MEMORY, TinyFolder

if TYPE_CHECKING:
    from tests.support.s3_server import S3Server

# Triton asks once, when it is imported, which transformers does: before any conftest below this.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What is imported stays: looking for garbage in it, again and again, took a tenth of collection.
gc.disable()

COLLECTED = pytest.StashKey[set[str]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[COLLECTED] = set(sys.modules)
    gc.freeze()
    gc.enable()


@pytest.fixture
def modules_after_collection(pytestconfig: pytest.Config) -> set[str]:
    """The modules that were loaded when all tests were collected and none had run."""
    return pytestconfig.stash[COLLECTED]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """Folder of the tiny model of a family, by model type."""
    from tests.support.tiny import LISTED

    built: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in built:
            built[family] = LISTED[family](tmp_path_factory.mktemp(family))
        return built[family]

    return folder


@pytest.fixture(scope="session")
def llava(tiny_folder: TinyFolder) -> Path:
    """Folder of the tiny LLaVA."""
    return tiny_folder("llava")


@pytest.fixture
def memory_folder(tmp_path: Path) -> Generator[Path]:
    """A folder in memory where there is one: thousands of fsyncs of a disk take minutes."""
    if not os.access(IN_MEMORY, os.W_OK):
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
            yield Path(name)


@pytest.fixture(scope="module")
def threads_as_before() -> Generator[None]:
    """Sets torch's number of threads back when a module that changes it has run."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def s3_server() -> "Generator[S3Server]":
    """A real S3 server on this machine; only the tests that ask for it load its libraries."""
    from tests.support.s3_server import S3Server

    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.make_bucket()
    yield server
    server.stop()


@pytest.fixture
def s3(
    s3_server: "S3Server", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> "Generator[S3Server]":
    """The S3 server, well-behaved to begin with, found by this process and its children."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EMKD_DOWNLOADS", str(tmp_path / "downloads"))
    s3_server.behave()
    yield s3_server
    s3_server.behave()


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
