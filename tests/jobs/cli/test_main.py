"""Promises of the command line: flags become settings, and bad input is named with exit code 2."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import extras
from jobs.cli.__main__ import BROKEN_PIPE, main, parse
from jobs.cli.removed_flags import REMOVED, RENAMED_FIELDS
from jobs.cluster.paths import absolute, config_json
from pipeline.config.stages import TrainConfig
from student_train.config.objective import preset
from teacher_cache.schema.options import RecordSettings
from tests.support.lazy import entrypoint, run_flags
from tests.support.llava_json import write_llava_json
from tests.support.paths import ROOT
from tests.support.tiny import tiny_samples

BUILD = "build --source data.json --teacher teacher --out cache"
TRAIN = "train --cache cache --student teacher --out run"


def _train(text: str) -> TrainConfig:
    command: Any = parse(f"{TRAIN} {text}".split())
    return command.config


def test_the_commands_of_readme_parse() -> None:
    build: Any = parse(
        f"{BUILD} --format webdataset --records topk+sketch --top-k 64 --num-workers 2".split()
    )
    assert build.config.format == "webdataset"
    assert build.config.source.path == "data.json"
    assert (build.run.ray, build.run.num_workers) == (True, 2)
    local: Any = parse(f"{BUILD} --no-ray".split())
    assert local.run.ray is False
    data: Any = parse(["data", "digits", "--out", "data"])
    assert (data.config.out, data.config.num_heldout) == (Path("data"), 512)
    report: Any = parse(["report", "runs/a", "runs/b", "--out", "page.html"])
    assert report.runs == (Path("runs/a"), Path("runs/b"))


def test_an_objective_is_a_preset_with_overrides() -> None:
    assert _train("").training.objective == preset("emkd")
    assert _train("--objective supervised").training.objective == preset("supervised")
    changed = _train("--vsd-weight 0 --temperature 2 --match-metric prob_l1").training.objective
    assert changed.temperature == 2
    assert changed.matching.metric == "prob_l1"
    assert changed.vsd_weight == 0


@pytest.mark.parametrize(
    "arguments",
    [
        f"{BUILD} --topk 3",
        f"{BUILD} --format parquet",
        "build --source data.json",
        f"{TRAIN} --vlad-weight heavy",
        "frobnicate",
    ],
)
def test_flags_that_cannot_be_parsed_end_with_usage(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (f"{BUILD} --top-k 0", "emkd build: --top-k must be >= 1, found 0\n"),
        (f"{BUILD} --num-workers=0", "emkd build: --num-workers must be >= 1, found 0\n"),
        (f"{TRAIN} --temperature 0", "emkd train: --temperature must be > 0, found 0.0\n"),
        (f"{TRAIN} --max-retries -1", "emkd train: --max-retries must be >= 0, found -1\n"),
        (
            f"{TRAIN} --match-shared-ids 0",
            "emkd train: num_shared_ids must be >= 1, or None for all, found 0\n",
        ),
        (
            f"{TRAIN} --objective rld --vsd-weight 1",
            "emkd train: --objective 'rld' has no vsd term, found vsd_weight 1.0; set it to 0 or "
            "take objective 'emkd'\n",
        ),
        ("data digits --out d --num-train 0", "emkd data: --num-train must be >= 1, found 0\n"),
        (
            f"{BUILD} --worker-timeout 5 --no-ray",
            "emkd build: --worker-timeout must be > 0 and needs Ray workers; found 5.0 "
            "without ray\n",
        ),
    ],
)
def test_what_settings_refuse_is_said_in_one_line_that_opens_with_the_flag(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2
    assert capsys.readouterr().err == message


def test_an_unknown_flag_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(f"{BUILD} --topk 3".split())
    assert "--top-k" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["json", "yaml", "inline"])
def test_settings_written_by_a_run_can_be_fed_back(form: str, tmp_path: Path) -> None:
    config = _train("--objective rld --seed 3 --train-parts projector")
    file = tmp_path / f"config.{form}"
    plain = json.loads(config_json(config))
    file.write_text(yaml.safe_dump(plain) if form == "yaml" else json.dumps(plain))
    given = json.dumps(plain) if form == "inline" else str(file)
    again: Any = parse(["train", "--config", given])
    assert again.config == absolute(config)
    other: Any = parse(["train", "--config", given, "--seed", "4"])
    assert other.config == absolute(config).with_training(seed=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strid": 1}, "strid: unknown field; did you mean 'stride'?"),
        ({"stride": "1"}, "stride: "),
        ({"seed": 1}, "seed: unknown field"),
        ({"training": {"sede": 1}}, "training.sede: unknown field; did you mean 'seed'?"),
        ({"training": {"objective": {"naem": "rld"}}}, "training.objective.naem: unknown field"),
        ({"cache": None}, "cache: "),
    ],
)
def test_a_config_file_is_read_strictly(
    change: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**json.loads(config_json(_train(""))), **change}))
    assert main(["train", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(file) in error


def test_a_config_file_with_the_training_settings_at_its_top_level_is_read(tmp_path: Path) -> None:
    nested = json.loads(config_json(_train("--objective rld --seed 3")))
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**nested.pop("training"), **nested}))
    again: Any = parse(["train", "--config", str(file)])
    assert (again.config.training.seed, again.config.training.objective.name) == (3, "rld")


@pytest.mark.parametrize("text", ["{", "cache: [", ""])
def test_a_file_that_is_no_config_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("run.json", "run.yaml"):
        (tmp_path / name).write_text(text)
        assert main(["train", "--config", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err


def test_a_missing_config_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "nowhere.json"]) == 2
    assert "nowhere.json: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["build", "extend", "train", "evaluate"])
def test_what_submit_sends_parses_to_the_same_settings(name: str) -> None:
    flags = {
        "build": "--source s.json --teacher t --out o --top-k 7 --num-workers 3",
        "extend": "--cache c --source s.json --teacher t --out o --num-workers 2",
        "train": "--cache c --student s --out o --objective rld --gpus-per-worker 0.5",
        "evaluate": "--model m --source s.json --out o --scores anls --ray",
    }[name]
    submitted: Any = parse(["submit", name, "--address", "http://host:1", "--", *flags.split()])
    sent = entrypoint(name, config_json(submitted.payload.config), run_flags(submitted.payload.run))
    words = shlex.split(sent)
    assert words[:4] == ["python", "-P", "-m", "emkd"]
    received: Any = parse(words[4:])
    assert received.config == absolute(submitted.payload.config)
    assert received.run == submitted.payload.run


def test_submit_checks_the_flags_of_the_stage_before_sending() -> None:
    with pytest.raises(SystemExit):
        parse(["submit", *BUILD.split()[:1], "--", *BUILD.split()[1:], "--bogus", "3"])
    assert main(["submit", "build"]) == 2
    assert main(["submit", "build", "--", *BUILD.split()[1:], "--top-k", "0"]) == 2


def test_build_verify_inspect_as_commands(
    tmp_path: Path, llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_llava_json(tmp_path, tiny_samples(5))
    cache = tmp_path / "cache"
    build = ["build", "--source", str(source), "--teacher", str(llava)]
    assert main([*build, "--out", str(cache), "--no-ray", "--top-k", "4"]) == 0
    assert main(["verify", str(cache)]) == 0
    assert "no problem found" in capsys.readouterr().out
    assert main(["inspect", str(cache), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 5
    key = tiny_samples(1)[0].key
    assert main(["inspect", str(cache), "--sample", key[:8]]) == 0
    assert "what is picture 0?" in capsys.readouterr().out
    assert main(["inspect", str(cache), "--sample", "zz"]) == 2
    shard = next((cache / "shards").glob("[0-9]*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    assert main(["verify", str(cache)]) == 3
    assert shard.name in capsys.readouterr().out


@pytest.mark.parametrize("given", list(REMOVED))
def test_what_earlier_versions_took_is_refused_with_what_to_do(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in (given, given.replace(" ", "="), given.replace("-", "_").replace("__", "--", 1)):
        assert main([*TRAIN.split(), *flags.split(" ")]) == 2
        assert capsys.readouterr().err == f"emkd train: {given} {REMOVED[given]}\n"


@pytest.mark.parametrize("field", list(RENAMED_FIELDS))
def test_a_renamed_field_of_a_config_file_is_refused_with_its_new_place(
    field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "--config", json.dumps({field: None})]) == 2
    assert f"{field} is now {RENAMED_FIELDS[field]}; move it there" in capsys.readouterr().err


def test_a_build_config_with_its_record_settings_at_the_top_level_is_read() -> None:
    command: Any = parse(f"{BUILD} --top-k 9 --top-p 0.9 --min-k 2".split())
    nested = json.loads(config_json(command.config))
    flat = {**nested.pop("settings"), **nested}
    del flat["grid"]
    again: Any = parse(["build", "--config", json.dumps(flat)])
    assert again.config == absolute(command.config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ratios 0.5", "a grid needs both --compressor and --ratios"),
        ("--compressor dart", "a grid needs both --compressor and --ratios"),
        ("--compress-layer 3", "--compress-layer would have no effect: no ratios are given"),
        (
            "--compressor dart --ratios 0.5 --compress-seed 1",
            "--compress-seed would have no effect: the compressor dart draws no random numbers",
        ),
        (
            "--compressor random --ratios 0.5 --compress-text released",
            "--compress-text would have no effect: the compressor random uses no text",
        ),
    ],
)
def test_flags_that_make_no_grid_are_refused(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(f"{BUILD} {flags}".split()) == 2
    assert message in capsys.readouterr().err


def test_flags_of_new_records_need_records(capsys: pytest.CaptureFixture[str]) -> None:
    extend = "extend --cache c --teacher t --out o"
    assert main(f"{extend} --source s.json --top-k 4".split()) == 2
    assert "--top-k would have no effect: no records are given" in capsys.readouterr().err
    command: Any = parse(f"{extend} --records hidden --hidden-dtype int8".split())
    assert command.config.settings == RecordSettings(records="hidden", hidden_dtype="int8")
    again: Any = parse(["extend", "--config", config_json(command.config), "--hidden-group", "8"])
    assert again.config.settings.hidden_group == 8
    assert again.config.settings.hidden_dtype == "int8"


@pytest.mark.parametrize(
    ("command", "extra", "missing"),
    [
        ("report run", "report", "matplotlib"),
        ("inspect cache --sample a --picture a.png", "report", "matplotlib"),
        ("data digits --out d", "demo", "sklearn"),
        ("demo", "demo", "sklearn"),
    ],
)
def test_a_command_whose_extra_is_missing_refuses_at_once(
    command: str,
    extra: str,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == missing else "found")
    assert main(command.split()) == 2
    said = capsys.readouterr().err
    assert f"not installed: {missing}; run pip install 'emkd[{extra}]'" in said


def _python(code: str, command: str = "") -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-c", code, *command.split()]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["--help", "--version", "plan", "train --help"])
def test_quick_commands_load_no_heavy_library(command: str) -> None:
    code = f"""if True:
        import sys
        from jobs.cli.__main__ import main
        try:
            main({command.split()!r})
        except SystemExit:
            pass
        print("LOADED", *{{name.split(".")[0] for name in sys.modules}})
        """
    ran = _python(code)
    loaded = set(ran.stdout.partition("LOADED")[2].split())
    assert "jobs" in loaded, ran.stderr
    assert not loaded & {"torch", "transformers", "ray", "numpy", "pyarrow", "matplotlib", "PIL"}


def test_building_and_training_need_none_of_the_extras() -> None:
    code = """if True:
        import sys
        sys.modules.update(dict.fromkeys(("sklearn", "matplotlib")))  # as if not installed
        import jobs.stages.build, jobs.stages.train, jobs.stages.evaluate
        """
    ran = _python(code)
    assert ran.returncode == 0, ran.stderr


def test_help_into_a_pipe_that_closes_ends_quietly() -> None:
    command = f"{shlex.quote(sys.executable)} -m jobs.cli.__main__ --help | head -c 1"
    ran = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stderr == ""
    assert ran.returncode in (0, BROKEN_PIPE)
