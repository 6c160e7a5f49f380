"""The plugin in docs/families.md works as it stands there, through the command itself."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli.__main__ import main
from pipeline.config.plugins import load_plugins
from tests.support.llava_json import write_llava_json
from tests.support.paths import ROOT, TinyFolder
from tests.support.tiny import tiny_samples

SAVE_AS_THE_FAMILY = """
import sys
import my_family
from transformers import LlavaForConditionalGeneration
vanilla = LlavaForConditionalGeneration.from_pretrained(sys.argv[1])
fields = vanilla.config.to_dict()
del fields["model_type"], fields["architectures"]
model = my_family.MyModel(my_family.MyConfig(**fields))
model.load_state_dict(vanilla.state_dict())
model.save_pretrained(sys.argv[1])
"""


def _emkd(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-m", "emkd", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.timeout(300)  # four processes, each of which imports transformers
def test_an_unknown_family_is_built_and_trained_with_its_plugin(
    tmp_path: Path,
    tiny_folder: TinyFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (ROOT / "docs/families.md").read_text()
    code = next(c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "my_family" in c)
    (tmp_path / "my_family.py").write_text(code)
    model = Path(shutil.copytree(tiny_folder("llava"), tmp_path / "my-model"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    script = [sys.executable, "-c", SAVE_AS_THE_FAMILY, str(model)]
    subprocess.run(script, env=environment, check=True, capture_output=True)
    write_llava_json(tmp_path, tiny_samples(4)).rename(tmp_path / "train.json")

    build = ("build", "--no-ray", "--source", "train.json", "--teacher", "my-model")
    build = (*build, "--out", "cache", "--records", "topk", "--top-k", "8", "--device", "cpu")
    monkeypatch.chdir(tmp_path)
    assert main([*build]) == 2
    said = capsys.readouterr().err
    assert "type 'my_family' are not supported" in said
    assert "--plugin MODULE" in said
    plugin = ("--plugin", "my_family")
    built = _emkd(tmp_path, *build, *plugin)
    assert built.returncode == 0, built.stderr
    [named] = json.loads((tmp_path / "cache/plan.json").read_text())["spec"]["plugins"]
    assert named.startswith("my_family ")

    train = ("train", "--no-ray", "--cache", "cache", "--student", "my-model", "--out", "run")
    train = (*train, "--projector", "none", "--objective", "supervised", "--max-steps", "1")
    trained = _emkd(tmp_path, *train, "--batch-size", "2", "--device", "cpu", *plugin)
    assert trained.returncode == 0, trained.stderr

    (tmp_path / "my_family.py").write_text(code + "\n# changed\n")
    verified = _emkd(tmp_path, "verify", "cache", "--teacher", "my-model", *plugin)
    assert verified.returncode == 3
    assert "differs in plugins" in verified.stdout


def test_a_plugin_that_cannot_be_imported_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_plugin.py").write_text("import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    said = {
        "no_such_plugin": "there is no such module; install it, or put its folder into PYTHONPATH",
        "no_such.plugin": "there is no such module",
        "broken_plugin": "broken_plugin.py fails: ModuleNotFoundError: No module named 'nothing",
    }
    stages = {
        "build": ("--source", "s.json", "--teacher", "t", "--out", "c"),
        "train": ("--cache", "c", "--student", "s", "--out", "r"),
        "evaluate": ("--model", "m", "--source", "s.json", "--out", "e"),
        "extend": ("--cache", "c", "--teacher", "t", "--out", "o", "--source", "s.json"),
        "plan": ("--pilot", "2", "--source", "s.json", "--teacher", "t"),
        "verify": ("c",),
        "inspect": ("c",),
    }
    for stage, flags in stages.items():
        for plugin, message in said.items():
            assert main([stage, *flags, "--plugin", "json", "--plugin", plugin]) == 2
            found = capsys.readouterr().err
            assert f"--plugin {plugin}: " in found
            assert message in found
            assert len(found.splitlines()) == 1


def test_every_file_of_a_package_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "plugin_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("A = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    [before] = load_plugins(["plugin_package"])
    assert load_plugins(["plugin_package"]) == (before,)
    (package / "part.py").write_text("A = 2\n")
    assert load_plugins(["plugin_package"]) != (before,)
