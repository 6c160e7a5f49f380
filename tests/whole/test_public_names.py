"""The package `emkd`: its names are the real ones, documented, and cost nothing until used."""

import ast
import importlib.metadata
import re
import subprocess
import sys

import pytest

import emkd
from pipeline.config.build import SourceConfig
from student_train.config.objective import ObjectiveConfig
from tests.support.paths import DOCS, ROOT
from tests.whole.test_architecture import HEAVY, PACKAGES, imported_by


def _imports_for_checkers() -> dict[str, str]:
    """Of the block that type checkers read: name here -> module:name there."""
    tree = ast.parse((ROOT / "emkd" / "__init__.py").read_text())
    return {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(PACKAGES)
        for alias in node.names
    }


def test_each_name_is_what_a_type_checker_takes_it_for() -> None:
    assert _imports_for_checkers() == vars(emkd)["_HOMES"]
    assert {*vars(emkd)["_HOMES"], "__version__"} == set(emkd.__all__) == set(dir(emkd))


def test_each_name_is_defined_where_it_is_looked_for() -> None:
    for home in vars(emkd)["_HOMES"].values():
        module, _, name = home.partition(":")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        assert name in {getattr(node, "name", None) for node in tree.body}, home


def test_a_name_is_the_real_object() -> None:
    assert emkd.SourceConfig is SourceConfig
    assert emkd.preset("emkd") == ObjectiveConfig()


def test_importing_it_imports_nothing_heavy_and_nothing_of_ours() -> None:
    (loaded,) = imported_by("emkd")
    assert not loaded & {*HEAVY, *PACKAGES}


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"emkd has no 'Reader'; it has .*CacheReader"):
        _ = emkd.Reader  # pyright: ignore[reportAttributeAccessIssue]


def test_its_version_is_the_distributions() -> None:
    assert emkd.__version__ == importlib.metadata.version("emkd")


def test_python_m_emkd_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "emkd", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "usage: emkd" in done.stdout


def test_architecture_md_lists_exactly_these_names() -> None:
    page = (DOCS / "architecture.md").read_text()
    table = page.split("## Public names")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert listed == set(emkd.__all__)
