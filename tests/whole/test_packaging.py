"""The package's metadata: every lower bound was tried."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def test_every_lower_bound_is_a_version_that_was_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tried = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints-lowest.txt").read_text().splitlines()
        if "==" in line
    )
    wanted = [Requirement(line) for line in [*project["dependencies"], *extras["s3"]]]
    wanted += [Requirement(line) for name in ("report", "demo") for line in extras[name]]
    bounds = {
        re.sub(r"[-_.]+", "-", each.name.lower()): str(bound.version)
        for each in wanted
        for bound in each.specifier
        if bound.operator == ">="
    }
    assert len(bounds) > 20
    for name, bound in bounds.items():
        assert Version(tried[name]) == Version(bound), name
