"""The house rules that a reader relies on: who imports what, what --help costs, README's tree."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "teacher_cache", "student_train", "jobs")


def imported_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_is_ours_and_in_this_repository(package: str) -> None:
    owners = importlib.metadata.packages_distributions().get(package, [])
    assert set(owners) <= {"emkd"}
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert Path(str(spec.origin)).resolve().parent == ROOT / package


def test_settings_and_the_command_line_import_nothing_heavy() -> None:
    loaded = imported_by("import jobs.cli")
    assert not loaded & {"torch", "ray", "transformers", "pyarrow", "numpy", "webdataset"}


def test_the_stream_knows_neither_transformers_nor_ray_nor_the_teacher() -> None:
    code = "import student_train.stream, sys; print([m for m in sys.modules if m in %r])"
    forbidden = ["transformers", "ray", "teacher_cache.teacher", "teacher_cache.writer"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code % forbidden],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_the_import_test_can_fail() -> None:
    assert "transformers" in imported_by("import teacher_cache.teacher")


def test_package_docstrings_are_all_that_an_init_file_holds() -> None:
    for package in PACKAGES:
        lines = (ROOT / package / "__init__.py").read_text().strip().splitlines()
        assert len(lines) == 1, package
        assert lines[0].startswith('"""'), package


def test_no_file_is_longer_than_the_ceiling() -> None:
    files = [
        f for folder in (*PACKAGES, "tests", "benchmarks") for f in ROOT.glob(f"{folder}/**/*.py")
    ]
    assert files
    long = {
        str(f.relative_to(ROOT)): n for f in files if (n := len(f.read_text().splitlines())) > 350
    }
    assert not long


def test_the_tree_in_readme_is_the_tree() -> None:
    readme = (ROOT / "README.md").read_text()
    block = readme.split("<!-- tree -->")[1].split("<!-- /tree -->")[0]
    shown = set(re.findall(r"([\w./-]+\.(?:py|md|j2|txt|toml))\b", block))
    for package in PACKAGES:
        for file in (ROOT / package).glob("*.py"):
            if file.name != "__init__.py":
                assert file.name in shown, f"README's tree lacks {package}/{file.name}"
    known = {f.name for f in ROOT.rglob("*") if f.is_file() and ".venv" not in f.parts}
    assert shown <= known, f"README's tree shows what is not there: {sorted(shown - known)}"


def test_importing_the_command_line_does_not_take_the_standard_modules_names() -> None:
    names = {f.stem for package in PACKAGES for f in (ROOT / package).glob("*.py")}
    assert not names & (set(sys.stdlib_module_names) - {"__init__"})
