"""Promises of `emkd train` where a cache and a student do not fit: each remedy of a message is one.

docs/operations.md has the table of causes.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.__main__ import main
from student_train.training.checkpoint import PREFLIGHT_FILE
from teacher_cache.folder.reader import CacheReader
from tests.conftest import TinyFolder
from tests.support.runs import tiny_cache
from tests.support.tiny_parts import template

pytestmark = pytest.mark.usefixtures("threads_as_before")

QUICK = "--max-steps 1 --batch-size 2 --device cpu --no-ray --torch-threads 1 --loader-threads 0"


@pytest.fixture(scope="module")
def vanilla(tiny_folder: TinyFolder) -> Path:
    return tiny_folder("llava_next")


@pytest.fixture(scope="module")
def reader(vanilla: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return tiny_cache(tmp_path_factory.mktemp("preflight") / "cache", vanilla, num_samples=5)


def edit(file: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def fewer_merges(student: Path) -> None:
    """The same ids for the same tokens, but `ho` is not merged in `how`."""

    def change(content: Any) -> None:
        merges = content["model"]["merges"]
        content["model"]["merges"] = [pair for pair in merges if "".join(pair) != "ho"]

    edit(student / "tokenizer.json", change)


def no_system(student: Path) -> None:
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (student / "chat_template.jinja").write_text(refuse + template("<image>"))


def short_context(student: Path) -> None:
    def change(content: Any) -> None:
        content["text_config"]["max_position_embeddings"] = 62

    edit(student / "config.json", change)


@pytest.mark.parametrize(
    ("change", "says", "remedy"),
    [
        (fewer_merges, "x the student's tokenizer gives", ""),
        (
            no_system,
            "1 x the chat template refuses the conversation: no system ('tiny-4')",
            "template",
        ),
        (short_context, "the model's context holds 62", ""),
    ],
)
def test_every_remedy_of_a_refusal_lets_the_run_begin(
    change: Callable[[Path], None],
    says: str,
    remedy: str,
    vanilla: Path,
    reader: CacheReader,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    student = Path(shutil.copytree(vanilla, tmp_path / "student"))
    change(student)

    def train(run: str, *more: str, of: Path = student) -> int:
        words = ["train", "--cache", reader.cache.url, "--student", str(of), *QUICK.split()]
        return main([*words, "--out", str(tmp_path / run), *more])

    assert train("run") == 2
    message = capsys.readouterr().err
    assert says in message
    assert " of 5 samples of " in message
    listed = json.loads((tmp_path / "run" / PREFLIGHT_FILE).read_text())["misfits"]
    assert f"{len(listed)} of 5 samples" in message
    assert 0 < len(listed) < 5
    assert [path.name for path in (tmp_path / "run").iterdir()] == [PREFLIGHT_FILE]
    assert "--on-bad-sample skip" in message
    assert train("skipped", "--on-bad-sample", "skip") == 0
    if remedy == "template":
        file = tmp_path / "teacher.jinja"
        file.write_text(template("<image>"))
        assert train("run", "--chat-template", str(file)) == 0
    else:  # the teacher's tokenizer, or a student with a longer context
        assert train("run", of=vanilla) == 0
