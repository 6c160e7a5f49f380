"""EPIC on the command line: an objective alone is enough, and no flag is without effect."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.__main__ import main, parse
from jobs.cluster.paths import absolute, config_json
from pipeline.config.stages import TrainConfig
from student_train.config.objective import ObjectiveName, preset
from student_train.config.progression import ProgressionConfig
from student_train.config.recipe import TrainerSettings
from student_train.training.metrics_log import METRICS_LOG_FILE
from tests.support.epic import save_deep
from tests.support.runs import tiny_cache

TRAIN = "train --cache cache --student student --out run"


def config_of(flags: str) -> TrainConfig:
    command: Any = parse(f"{TRAIN} {flags}".split())
    return command.config


def training_of(flags: str) -> TrainerSettings:
    return config_of(flags).training


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", None),
        ("--objective rld --schedule none", None),
        ("--objective epic-tcd", ProgressionConfig()),
        ("--objective epic-cached-lcd", ProgressionConfig(schedule="lcd")),
        (
            "--objective epic-icd --icd-layers 9 5 --compress-layer 3",
            ProgressionConfig(schedule="icd", icd_layers=(9, 5), layer=3),
        ),
        (
            "--objective epic-tcd --schedule tcd --compressor fastv --compress-text released",
            ProgressionConfig(compressor="fastv", text="released"),
        ),
        (
            "--objective epic-tcd --schedule-preset fixed --ratio 0.75 --ratio-gap 0.2",
            ProgressionConfig(preset="fixed", ratio=0.75, gap=0.2),
        ),
        (
            "--schedule tcd --schedule-preset released_code --compressor random",
            ProgressionConfig(preset="released_code", compressor="random"),
        ),
        ("--objective supervised --schedule lcd", ProgressionConfig(schedule="lcd")),
    ],
)
def test_the_progression_is_the_objectives_unless_flags_say_more(
    flags: str, expected: ProgressionConfig | None
) -> None:
    assert training_of(flags).progression == expected


def test_weights_and_divergence_of_an_objective_have_flags() -> None:
    found = training_of("--objective epic-tcd --supervised-weight 0.5 --kd-weight 0.5").objective
    assert (found.supervised_weight, found.kd_weight) == (0.5, 0.5)
    assert training_of("--objective epic-tcd").objective == preset("epic-tcd")
    assert training_of("--divergence forward_kl").objective.divergence == "forward_kl"
    assert config_of("--projector none --objective supervised").projector == "none"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ratio 0.5", "--ratio would have no effect"),
        ("--objective supervised --compressor dart --compress-layer 3", "--compressor, --compress"),
        ("--schedule none --icd-layers 4", "--icd-layers would have no effect"),
        ("--objective epic-tcd --ratio 0.5", "ratio is set, but the preset paper_notes"),
        ("--objective epic-tcd --ratio-gap 0.1", "gap is set, but the preset paper_notes"),
        ("--objective epic-tcd --schedule-preset fixed", "the preset fixed needs a ratio"),
        ("--objective epic-tcd --schedule-preset fixed --ratio 1.5", "0 < ratio < 1, found 1.5"),
        ("--objective epic-tcd --icd-layers 4", "but the schedule is tcd"),
        ("--objective epic-tcd --schedule lcd", "'epic-tcd' goes with schedule 'tcd', found 'lcd'"),
        ("--objective epic-tcd --schedule none", "'epic-tcd' goes with schedule 'tcd', found None"),
        ("--objective epic-tcd --kd-weight 0", "is its kd term, found kd_weight 0"),
        ("--kd-weight 0.5", "'emkd' has no kd term"),
        ("--objective epic-tcd --compressor random --compress-text released", "uses no text"),
        ("--objective epic-tcd --compress-layer 0", "layer is 0, expected 1 or more"),
        (
            "--schedule tcd --schedule-preset fixed --ratio 0.5 --ratio-gap 0.1",
            "gap would have no effect: objective 'emkd' has no kd term",
        ),
        ("--projector none --stride 4", "stride would have no effect: projector none"),
        ("--objective supervised --temperature 2", "--temperature would have no effect"),
        ("--objective epic-tcd --divergence jsd", "'epic-tcd' has the terms kd, supervised alone"),
        ("--objective epic-tcd --tail bucket", "--tail would have no effect"),
        (
            "--objective rld --match-scope global --vlad-text all",
            "--vlad-text, --match-scope would",
        ),
        ("--tail bucket --blend 0.1", "--blend would have no effect: tail is bucket"),
        ("--match-metric prob_l1 --match-shared-ids 9", "matching by prob_l1 looks at the whole"),
    ],
)
def test_a_flag_without_effect_is_refused(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(f"{TRAIN} {flags}".split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        "--objective epic-tcd --temperature 2",
        "--objective epic-cached-tcd --temperature 2 --tail blend --blend 0.1",
        "--objective epic-tcd --vlad-weight 1 --match-metric hidden_l2 --smooth-l1-beta 2",
    ],
)
def test_a_flag_with_any_effect_is_taken(flags: str) -> None:
    assert training_of(flags).objective.name in flags


def test_settings_can_be_fed_back_and_changed(tmp_path: Path) -> None:
    config = config_of("--objective epic-tcd --projector none --compressor fastv")
    file = tmp_path / "config.json"
    file.write_text(config_json(config))

    def again(flags: str = "") -> TrainConfig:
        command: Any = parse(["train", "--config", str(file), *flags.split()])
        return command.config

    assert again() == absolute(config)
    assert json.loads(config_json(again()))["training"]["progression"]["compressor"] == "fastv"
    fastv = ProgressionConfig(compressor="fastv")
    assert again("--compress-layer 5").training.progression == ProgressionConfig(
        compressor="fastv", layer=5
    )
    assert again("--objective supervised").training.progression == fastv
    assert again("--objective supervised --schedule none").training.progression is None
    lcd = again("--objective epic-lcd").training.progression
    assert lcd == ProgressionConfig(schedule="lcd", compressor="fastv")


def test_what_belongs_to_another_schedule_preset_or_objective_is_left_behind() -> None:
    def again(
        progression: ProgressionConfig, flags: str, name: ObjectiveName = "epic-tcd"
    ) -> ProgressionConfig | None:
        config = config_of("--objective epic-tcd --projector none")
        config = config.with_training(objective=preset(name), progression=progression)
        command: Any = parse(["train", "--config", config_json(config), *flags.split()])
        return command.config.training.progression

    constant = ProgressionConfig(preset="fixed", ratio=0.5, gap=0.2, compressor="fastv")
    assert again(constant, "--ratio 0.75") == dataclasses.replace(constant, ratio=0.75)
    fastv = ProgressionConfig(compressor="fastv")
    assert again(constant, "--schedule-preset paper_notes") == fastv
    lcd = dataclasses.replace(fastv, schedule="lcd")
    assert again(constant, "--objective epic-lcd --schedule-preset paper_notes") == lcd
    assert again(constant, "--objective supervised") == dataclasses.replace(constant, gap=None)
    icd = ProgressionConfig(schedule="icd", icd_layers=(8, 4), layer=1)
    assert again(icd, "--objective epic-tcd", "epic-icd") == ProgressionConfig(layer=1)


def test_the_help_has_one_group_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["train", "--help"])
    said = capsys.readouterr().out
    group = said.split("progression options")[1].split("╰")[0]
    for flag in ("schedule", "schedule-preset", "compressor", "compress-text", "compress-layer"):
        assert f"--{flag} " in group
    assert "--progression" not in said


def test_one_command_trains_a_vanilla_model(tmp_path: Path) -> None:
    vanilla = save_deep(tmp_path)
    tiny_cache(tmp_path / "cache", vanilla, num_samples=4)
    run = tmp_path / "run"
    flags = "--objective epic-tcd --projector none --compressor dart --max-steps 2 --batch-size 2"
    where = f"--cache {tmp_path / 'cache'} --student {vanilla} --out {run}"
    how = "--micro-batch-size 2 --device cpu --no-ray --log-steps 1"
    assert main(f"train {where} {flags} {how}".split()) == 0
    line = json.loads((run / METRICS_LOG_FILE).read_text().splitlines()[-1])
    assert {"term/supervised", "term/kd", "diagnostic/epic_layer"} <= line.keys()
    assert main(["train", "--config", str(run / "config.json"), "--no-ray"]) == 0
