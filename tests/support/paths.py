"""Where files are: those of the repository, and those of the tiny models."""

from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
DOCS = ROOT / "docs"
GOLDEN = TESTS / "golden"
IN_MEMORY = Path("/dev/shm")
TinyFolder = Callable[[str], Path]
"""The folder of the tiny model of a family, by model type."""
