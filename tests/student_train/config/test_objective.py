"""Objectives stored by earlier versions are read as before, or refused by name."""

import dataclasses
import json

import pytest

from student_train.config.objective import ObjectiveConfig
from teacher_cache.schema.errors import DecodeError
from teacher_cache.schema.strict_json import decode_json


def stored_with(solver: str) -> str:
    fields = dataclasses.asdict(ObjectiveConfig())
    fields["matching"]["solver"] = solver
    return json.dumps(fields)


def test_the_solver_of_an_earlier_run_is_dropped() -> None:
    assert decode_json(ObjectiveConfig, stored_with("scipy"), "run") == ObjectiveConfig()


def test_the_removed_solver_is_refused_with_the_remedy() -> None:
    with pytest.raises(DecodeError, match=r"matching: .*solver is 'lapjvh'.*omit the field"):
        decode_json(ObjectiveConfig, stored_with("lapjvh"), "run")
