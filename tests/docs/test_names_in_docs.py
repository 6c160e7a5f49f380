"""Whatever a page names exists: functions, files, modules, commands, flags, links and anchors.

One set of rules for every page, so that a rename that forgets a page fails here.
"""

import io
import re
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

from jobs.cli.__main__ import main
from jobs.cli.stage_commands import defaults
from tests.support.paths import DOCS, ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
CODE = ("emkd", "jobs", "pipeline", "student_train", "teacher_cache", "tests", "benchmarks", "docs")
AUTO = {"AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"}
OTHERS = {"torch", "nn", "transformers", "scipy", "weight", "AWS_PROFILE", *AUTO}
"""First parts of names that belong to other libraries."""
OTHER_FLAGS = {"--no-deps", "--include-dashboard"}
"""Flags of other programs."""


@cache
def sources() -> dict[str, str]:
    """The text of every file of code, by its path from the root."""
    files = [f for folder in CODE for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".j2")]
    return {str(file.relative_to(ROOT)): file.read_text() for file in files}


@cache
def code() -> str:
    settings = ("pyproject.toml", "Makefile", "docs/format.md")
    return "\n".join([*sources().values(), *((ROOT / name).read_text() for name in settings)])


@cache
def words() -> set[str]:
    return set(re.findall(r"\w+", code()))


@cache
def flags() -> set[str]:
    """Every flag of every command, as its help prints it."""
    found = {"--help", "--version", "--config"}
    for command in defaults():
        said = io.StringIO()
        with redirect_stdout(said), pytest.raises(SystemExit):
            main([command, "--help"])
        found |= set(re.findall(r"--[a-z][a-z0-9-]*", said.getvalue()))
    return found


def spans(page: Path) -> list[str]:
    """What stands between backticks, and each line of the blocks of code."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    inline = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return inline + [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def defines(path: str, name: str, indent: str = "") -> bool:
    """Whether the file defines the name: at the top level, or at an indent inside a class."""
    pattern = rf"^{indent}(?:(?:async )?def |class )?{re.escape(name)}\b"
    return re.search(pattern, sources()[path], re.M) is not None


def is_setting(name: str) -> bool:
    """Whether a record has a field, or a file of JSON a key, of this name."""
    return f'"{name}"' in code() or re.search(rf"^    {name}: ", code(), re.M) is not None


def is_known(name: str) -> bool:
    """Whether a dotted name leads to a module, to what it defines, or to a setting."""
    first, *rest = parts = name.split(".")
    if first in OTHERS or f'"{name}"' in code() or all(map(is_setting, parts)):
        return True
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end])
        if f"{path}.py" in sources():
            return all(defines(f"{path}.py", each) for each in parts[end : end + 1])
        if first in CODE and (ROOT / path).is_dir():
            return end == len(parts)
    modules = [path for path in sources() if Path(path).stem == first]
    if modules:
        return any(defines(path, rest[0]) for path in modules)
    return any(defines(path, rest[0], "    ") for path in sources() if defines(path, first))


def is_word(name: str) -> bool:
    """Whether code has the word, or puts it together: `v_` and `_ids`."""
    cuts = range(1, len(name))
    return name in words() or any({name[:cut], name[cut:]} <= words() for cut in cuts)


def unknown(span: str) -> bool:
    """Whether a span is a name, of one of the kinds that can be looked up, and is not there."""
    name = re.sub(r"\(.*\)$", "", span)
    if re.fullmatch(r"[\w./-]+\.(py|md|j2|toml|txt|svg)", name):
        return not any(str(file).endswith(f"/{name}") for file in ROOT.rglob(Path(name).name))
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
        return not is_known(name)
    if re.fullmatch(r"\w+", name) and (re.search(r"\w_\w|[a-z][A-Z]", name)):
        return name not in OTHERS and not is_word(name)
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_and_files_exist(page: Path) -> None:
    assert not sorted({span for span in spans(page) if unknown(span)})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_modules_and_flags_exist(page: Path) -> None:
    said = "\n".join(spans(page))
    modules = re.findall(r"python -m ((?:benchmarks|jobs|tests)[\w.]*)", said)
    assert not [name for name in modules if f"{name.replace('.', '/')}.py" not in sources()]
    assert not set(re.findall(r"^\s*emkd ([a-z]+)\b", said, re.M)) - {*defaults(), "submit"}
    targets = set(re.findall(r"^\s*make ([a-z-]+)", said, re.M))
    assert not {name for name in targets if f"\n{name}:" not in (ROOT / "Makefile").read_text()}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", said)) - flags() - OTHER_FLAGS
    assert not {flag for flag in named if f'"{flag}"' not in code()}  # as benchmarks have theirs


def slug(heading: str) -> str:
    """The anchor of a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_and_their_anchors_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            assert anchor in map(slug, headings), target
