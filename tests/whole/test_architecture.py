"""The house rules that a reader relies on: who imports what, what --help costs."""

import ast
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from student_train.head.linear_head import LinearHead
from tests.support.paths import ROOT

PACKAGES = ("pipeline", "teacher_cache", "student_train", "jobs")
HEAVY = {"torch", "ray", "transformers", "pyarrow", "numpy", "webdataset"}


def imported_by(*names: str) -> list[set[str]]:
    """All modules of a fresh interpreter after each of these imports, one after the other."""
    code = "import sys, json\n"
    code += "".join(f"import {name}\nprint(json.dumps(list(sys.modules)))\n" for name in names)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [set(json.loads(line)) for line in done.stdout.splitlines()[-len(names) :]]


def test_each_package_is_ours_and_in_this_repository() -> None:
    owners = importlib.metadata.packages_distributions()
    for package in ("emkd", *PACKAGES):
        assert set(owners.get(package, [])) <= {"emkd"}, package
        spec = importlib.util.find_spec(package)
        assert spec is not None, package
        assert Path(str(spec.origin)).resolve().parent == ROOT / package


def test_settings_and_the_command_line_import_nothing_heavy() -> None:
    (loaded,) = imported_by("jobs.cli.__main__")
    assert not loaded & HEAVY


def test_training_knows_no_teacher_and_its_stream_not_even_transformers() -> None:
    stream, training = imported_by("student_train.data.stream", "student_train.training.run")
    forbidden = {"ray", "teacher_cache.teacher.teacher", "teacher_cache.folder.writer"}
    assert not stream & {"transformers", *forbidden}
    assert not training & forbidden
    assert "transformers" in training  # the test can fail


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


def test_importing_the_command_line_does_not_take_the_standard_modules_names() -> None:
    names = {f.stem for package in PACKAGES for f in (ROOT / package).glob("*.py")}
    assert not names & (set(sys.stdlib_module_names) - {"__init__"})


DEFINED_TWICE = {
    "logger": "each module's own, by convention",
    "T": "a type variable",
    "Plan": "a command is called as users type it; the other is what plan.json holds",
}
"""Public names that several modules define, and why they may."""


def test_no_public_name_is_defined_twice() -> None:
    homes: dict[str, list[str]] = {}
    for package in ("emkd", *PACKAGES):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.parse(file.read_text()).body:
                targets = node.targets if isinstance(node, ast.Assign) else [node]
                if isinstance(node, ast.AnnAssign):
                    targets = [node.target]
                for each in targets:
                    name = getattr(each, "name", getattr(each, "id", "_"))
                    if not name.startswith("_"):
                        homes.setdefault(name, []).append(str(file.relative_to(ROOT)))
    twice = {name: files for name, files in homes.items() if len(files) > 1}
    assert {name: files for name, files in twice.items() if name not in DEFINED_TWICE} == {}
    assert DEFINED_TWICE.keys() <= twice.keys()


def test_collecting_tests_loads_nothing_heavy(modules_after_collection: set[str]) -> None:
    heavy = {"transformers", "ray", "scipy", "pandas", "sklearn", "matplotlib", "accelerate"}
    heavy |= {"torch._dynamo", "torch.distributed.fsdp", "triton", "moto", "datasets", "sympy"}
    assert not modules_after_collection & heavy
    assert "torch" in modules_after_collection  # the test can fail


def test_tests_check_the_shapes_that_signatures_promise() -> None:
    with pytest.raises(TypeCheckError, match="weight"):
        LinearHead(weight=torch.zeros(3))


def test_every_test_file_lies_in_a_room_that_exists() -> None:
    files = [f.relative_to(ROOT / "tests") for f in (ROOT / "tests").rglob("test_*.py")]
    product = [f for f in files if f.parts[0] in PACKAGES]
    assert product
    stray = [str(f) for f in product if not (ROOT / f.parent / "__init__.py").is_file()]
    assert not stray
