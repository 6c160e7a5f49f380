"""Promise of schema/errors.py: every error class of the product derives from EmkdError."""

import ast

from teacher_cache.schema.errors import EmkdError, SampleError
from tests.support.paths import ROOT

PACKAGES = ("teacher_cache", "student_train", "pipeline", "jobs", "emkd")


def _is_error(bases: list[str]) -> bool:
    return any(base.endswith(("Error", "Exception")) for base in bases)


def test_all_error_classes_have_one_base_and_say_when_they_are_raised() -> None:
    found = 0
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            bases = [ast.unparse(base) for base in getattr(node, "bases", [])]
            if isinstance(node, ast.ClassDef) and _is_error(bases):
                assert node.name == "EmkdError" or bases[:1] == ["EmkdError"], (path, node.name)
                assert node.name == "EmkdError" or "Raised when" in (ast.get_docstring(node) or "")
                found += 1
    assert found >= 9
    assert issubclass(SampleError, EmkdError)
    assert issubclass(SampleError, ValueError), "what users can mend is a ValueError"
