"""Evaluations of what benchmarks have: several answers, choices, categories, no answers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.build import SourceConfig
from pipeline.config.stages import EvaluateConfig
from pipeline.report.run_folders import read_evaluation
from pipeline.student.predictions import Prediction, read_predictions, score_predictions
from teacher_cache.schema.checked_json import from_checked_json
from teacher_cache.schema.errors import CacheMismatchError
from tests.conftest import TinyFolder
from tests.support.lazy import evaluate

CROWD = ["red", "red", "Red", "crimson", "red", "red", "dark red", "red", "red", "red"]


def answered(folder: Path, model: Path, entries: list[dict[str, Any]], **settings: Any) -> Path:
    """The folder of an evaluation of these entries."""
    folder.mkdir()
    (folder / "set.json").write_text(json.dumps(entries))
    config = EvaluateConfig(
        model=str(model),
        source=SourceConfig(path=str(folder / "set.json")),
        out=folder / "eval",
        max_new_tokens=3,
        device="cpu",
        **settings,
    )
    evaluate(config)
    return folder / "eval"


def metrics(place: Path) -> dict[str, Any]:
    return from_checked_json((place / "metrics.json").read_bytes(), "metrics.json")


def prediction(answer: str, **fields: Any) -> Prediction:
    plain = Prediction(key="k", source_id="s", answer=answer, reference=None, seconds=0.0)
    return dataclasses.replace(plain, **fields)


def test_all_answers_of_the_annotators_are_references(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    entry = {"question": "Colour?", "answers": [{"answer": text} for text in CROWD]}
    place = answered(tmp_path / "vqa", tiny_folder("llava"), [entry], scores=("vqa_accuracy",))
    (found,) = read_predictions(place / "predictions.jsonl")
    assert found.reference == "red"
    assert found.references == tuple(CROWD)
    (score,) = score_predictions([prediction("Red.", references=tuple(CROWD))], "vqa_accuracy")
    assert score == 1
    (score,) = score_predictions([prediction("crimson", references=tuple(CROWD))], "vqa_accuracy")
    assert score == pytest.approx(0.3)


def test_choices_are_asked_for_and_scored_by_letter_or_text() -> None:
    known = {"references": ("B",), "choices": ("blue", "red")}
    given = [prediction(answer, **known) for answer in ("B", "(b)", "Red.", "A", "green")]
    assert score_predictions(given, "choice_accuracy") == [1, 1, 1, 0, 0]


def test_scores_are_also_given_by_category(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    entries = [
        {"question": f"{name} {number}?", "answer": "x", "category": name}
        for name, count in (("colour", 3), ("count", 1))
        for number in range(count)
    ]
    entries.append({"question": "Else?", "answer": "x"})
    found = metrics(answered(tmp_path / "cats", tiny_folder("llava"), entries))
    assert found["num_samples"] == found["num_scored"] == 5
    table = found["scores_by_category"]
    assert {name: row["num_samples"] for name, row in table.items()} == {"colour": 3, "count": 1}
    assert set(table["count"]) == {"num_samples", "exact_match", "word_accuracy"}


def test_a_set_without_references_gives_predictions_and_no_scores(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    entries = [{"question": f"What {number}?"} for number in range(3)]
    place = answered(tmp_path / "test", tiny_folder("llava"), entries)
    found = metrics(place)
    assert (found["num_samples"], found["num_scored"], found["scores"]) == (3, 0, {})
    assert found["scores_by_category"] is None
    assert [p.reference for p in read_predictions(place / "predictions.jsonl")] == [None] * 3
    assert read_evaluation(place).scores == {}
    # A sample is answered alike with and without a reference.
    known = [{**entry, "answer": "x"} for entry in entries]
    other = answered(tmp_path / "known", tiny_folder("llava"), known)
    answers = [
        [p.answer for p in read_predictions(each / "predictions.jsonl")] for each in (place, other)
    ]
    assert answers[0] == answers[1]


def test_some_references_score_those_samples_alone(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    entries = [{"question": "One?", "answer": "x"}, {"question": "Two?"}]
    place = answered(tmp_path / "some", tiny_folder("llava"), entries)
    assert metrics(place)["num_scored"] == 1
    assert len(read_evaluation(place).by_sample["exact_match"]) == 1


def test_a_sample_that_cannot_be_scored_is_named() -> None:
    with pytest.raises(ValueError, match=r"sample s: the reference 'green' is no letter"):
        score_predictions(
            [prediction("A", references=("green",), choices=("blue", "red"))], "choice_accuracy"
        )
    with pytest.raises(ValueError, match=r"sample s: vqa_accuracy of 2 references"):
        score_predictions([prediction("A", references=("a", "b"))], "vqa_accuracy")


def test_other_references_are_another_evaluation(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """The key of a sample does not say what else counts as right."""
    entry = {"question": "Colour?", "answers": ["red", "red", "crimson"]}
    place = answered(tmp_path / "a", tiny_folder("llava"), [entry])
    config = EvaluateConfig(
        model=str(tiny_folder("llava")),
        source=SourceConfig(path=str(tmp_path / "a" / "set.json")),
        out=place,
        max_new_tokens=3,
        device="cpu",
    )
    (tmp_path / "a" / "set.json").write_text(json.dumps([{**entry, "answers": ["red", "red"]}]))
    with pytest.raises(CacheMismatchError, match="samples"):
        evaluate(config)


def test_the_report_scores_the_predictions_not_the_file(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    place = answered(tmp_path / "set", tiny_folder("llava"), [{"question": "?", "answer": "x"}])
    found = metrics(place)
    found["scores"]["exact_match"] = 0.7  # as by an earlier rule
    (place / "metrics.json").write_text(json.dumps(found))
    evaluation = read_evaluation(place)
    (value,) = evaluation.by_sample["exact_match"].values()
    assert evaluation.scores["exact_match"] == value != 0.7


@pytest.mark.parametrize("field", ["text_version", "pictures"])
def test_answers_by_earlier_rules_are_not_continued(
    field: str, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """Folders of earlier versions lack the field; their prompts and pictures were others."""
    entry = [{"question": "?", "answer": "x"}]
    place = answered(tmp_path / "set", tiny_folder("llava"), entry)
    stored = from_checked_json((place / "evaluation.json").read_bytes(), "evaluation.json")
    del stored[field]
    (place / "evaluation.json").write_text(json.dumps(stored))
    config = EvaluateConfig(
        model=str(tiny_folder("llava")),
        source=SourceConfig(path=str(tmp_path / "set" / "set.json")),
        out=place,
        max_new_tokens=3,
        device="cpu",
    )
    with pytest.raises(CacheMismatchError, match=field):
        evaluate(config)
