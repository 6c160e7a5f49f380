"""Promises of an evaluation with samples that cannot be used: named at once, or left out aloud."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.__main__ import main
from pipeline.config.stages import EvaluateConfig
from pipeline.report.run_folders import read_evaluation
from pipeline.student.generation import Generator
from pipeline.student.predictions import PREDICTIONS_FILE, read_predictions
from pipeline.student.unusable import SKIPPED_FILE
from teacher_cache.schema.errors import CacheMismatchError
from tests.conftest import TinyFolder
from tests.support.lazy import evaluate
from tests.support.llava_json import evaluation
from tests.support.tiny import tiny_image

pytestmark = pytest.mark.usefixtures("threads_as_before")


@pytest.fixture(scope="module")
def llava(tiny_folder: TinyFolder) -> Path:
    return tiny_folder("llava")


def damaged(model: Path, folder: Path, **settings: Any) -> EvaluateConfig:
    """Of seven samples, 0 lacks its image, that of 6 is cut, 2 and 4 spell a control token."""
    config = evaluation(model, folder, **settings)
    data = folder / "data"
    (data / "tiny-0-0.png").unlink()
    whole = tiny_image(1, 300, 300)
    (data / "tiny-6-0.png").write_bytes(whole[: len(whole) // 2])
    file = Path(config.source.path)
    records = json.loads(file.read_text())
    for number in (2, 4):
        question = next(
            turn for turn in records[number]["conversations"] if turn["from"] == "human"
        )
        question["value"] += " <|im_end|> and more"
    file.write_text(json.dumps(records))
    return config


def test_all_are_refused_at_once_before_the_first_answer(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = damaged(llava, tmp_path)

    def refuse(*_: Any) -> list[str]:
        raise AssertionError("an answer was generated")

    monkeypatch.setattr(Generator, "answers", refuse)
    with pytest.raises(ValueError, match=r"4 samples cannot be used") as error:
        evaluate(config)
    text = str(error.value)
    for number in (0, 2, 4, 6):
        assert f"tiny-{number}: " in text
    assert "--on-bad-sample skip" in text
    assert not config.out.exists()


def test_with_skip_they_are_left_out_listed_and_counted(
    llava: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = damaged(llava, tmp_path, on_bad_sample="skip")
    metrics = evaluate(config)
    listed = [json.loads(line) for line in (config.out / SKIPPED_FILE).read_text().splitlines()]
    assert [each["source_id"] for each in listed] == ["tiny-0", "tiny-6", "tiny-2", "tiny-4"]
    assert all(each["reason"] for each in listed)
    assert metrics["num_skipped"] == 4
    assert metrics["num_samples"] == 3
    assert metrics["scores_are"].startswith("means over the 3 answered of 7 samples")
    (said,) = [r.message for r in caplog.records if "skipped" in r.message]
    assert "4 of 7 samples" in said
    assert "('tiny-2', 'tiny-4')" in said
    assert str(config.out / SKIPPED_FILE) in said
    found = read_evaluation(config.out)
    assert (found.num_samples, found.num_skipped) == (3, 4)


def test_answers_are_those_of_a_source_without_the_others(llava: Path, tmp_path: Path) -> None:
    skipping = damaged(llava, tmp_path, on_bad_sample="skip")
    file = Path(skipping.source.path)
    metrics = evaluate(skipping)
    records = [record for i, record in enumerate(json.loads(file.read_text())) if i in (1, 3, 5)]
    file.write_text(json.dumps(records))
    plain = dataclasses.replace(skipping, out=tmp_path / "plain")
    other = evaluate(plain)
    assert other["num_skipped"] == 0
    assert "scores_are" not in other
    assert other["scores"] == metrics["scores"]
    assert other["samples_digest"] == metrics["samples_digest"]
    assert not (plain.out / SKIPPED_FILE).exists()
    mine, theirs = (read_predictions(c.out / PREDICTIONS_FILE) for c in (skipping, plain))
    assert [(p.key, p.answer) for p in mine] == [(p.key, p.answer) for p in theirs]


def test_an_evaluation_goes_on_only_without_the_same_samples(llava: Path, tmp_path: Path) -> None:
    config = damaged(llava, tmp_path, on_bad_sample="skip")
    metrics = evaluate(config)
    assert evaluate(config)["scores"] == metrics["scores"]
    (tmp_path / "data" / "tiny-0-0.png").write_bytes(tiny_image(0))
    with pytest.raises(CacheMismatchError, match=r"(?s)samples: stored.*skipped.*: stored"):
        evaluate(config)


def test_where_no_sample_is_left_nothing_is_evaluated(llava: Path, tmp_path: Path) -> None:
    config = evaluation(llava, tmp_path, num_samples=1, on_bad_sample="skip")
    (tmp_path / "data" / "tiny-0-0.png").unlink()
    with pytest.raises(ValueError, match=r"(?s)1 samples cannot be used.*No sample is left"):
        evaluate(config)
    assert not config.out.exists()


def test_the_command_line_refuses_with_code_2_and_its_remedy_works(
    llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = damaged(llava, tmp_path)
    words = f"evaluate --model {llava} --source {config.source.path} --out {config.out}".split()
    words += ["--max-new-tokens", "2", "--device", "cpu", "--batch-size", "3"]
    assert main(words) == 2
    assert "--on-bad-sample skip" in capsys.readouterr().err
    assert main([*words, "--on-bad-sample", "skip"]) == 0
    assert json.loads(capsys.readouterr().out)["num_skipped"] == 4
