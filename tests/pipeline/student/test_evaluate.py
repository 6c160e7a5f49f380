"""Promises of pipeline/student/evaluate.py, with the predictions and pictures that it writes."""

import base64
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.build.build import build
from pipeline.config.stages import EvaluateConfig
from pipeline.student.generation import Generator
from pipeline.student.predictions import (
    Prediction,
    append_predictions,
    find_predictions,
    read_predictions,
    write_predictions,
)
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.schema.checked_json import from_checked_json
from teacher_cache.schema.errors import CacheMismatchError, IncompleteCacheError, SampleError
from teacher_cache.schema.samples import Sample
from tests.support.lazy import evaluate, student_from_vanilla
from tests.support.llava_json import evaluation, settings_of, small_build, write_llava_json
from tests.support.tiny import tiny_samples

TinyFolder = Callable[[str], Path]


@pytest.fixture(scope="module")
def students(
    tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def student(family: str) -> Path:
        if family not in made:
            model, processor = student_from_vanilla(str(tiny_folder(family)), "avgpool", 2)
            made[family] = tmp_path_factory.mktemp("student")
            model.save_pretrained(made[family])
            processor.save_pretrained(made[family])
        return made[family]

    return student


def _answers(config: EvaluateConfig) -> list[tuple[str, str, str | None]]:
    found = read_predictions(config.out / "predictions.jsonl")
    return [(p.key, p.answer, p.reference) for p in found]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_answers_of_a_batch_are_those_of_one_by_one(
    family: str, students: Callable[[str], Path], tmp_path: Path
) -> None:
    batched = evaluation(students(family), tmp_path)
    single = evaluation(students(family), tmp_path, out="single", batch_size=1)
    evaluate(batched)
    evaluate(single)
    assert _answers(batched) == _answers(single)
    assert len({answer for _, answer, _ in _answers(batched)}) > 1


def test_a_vanilla_model_is_evaluated_too(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    config = evaluation(tiny_folder("llava"), tmp_path, scores=("exact_match", "anls"))
    metrics = evaluate(config)
    assert metrics == from_checked_json((config.out / "metrics.json").read_bytes(), "metrics.json")
    assert metrics["num_samples"] == 7
    assert set(metrics["scores"]) == {"exact_match", "anls"}
    assert metrics["seconds"] > 0


def test_a_killed_evaluation_goes_on_and_gives_the_same_answers(
    students: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = evaluation(students("llava"), tmp_path)
    evaluate(whole)
    killed = dataclasses.replace(whole, out=tmp_path / "killed")

    def stop(_what: str, done: int, total: int) -> None:
        assert total == 7
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(killed, stop)
    path = killed.out / "predictions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:30])
    assert not (killed.out / "metrics.json").exists()
    seen: list[int] = []
    evaluate(killed, lambda _, done, _total: seen.append(done))
    assert seen == [6, 7]
    assert _answers(killed) == _answers(whole)


def test_a_finished_evaluation_asks_the_model_nothing(
    students: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = evaluation(students("llava"), tmp_path)
    metrics = evaluate(config)

    def refuse(*_: Any) -> list[str]:
        raise AssertionError("asked again")

    monkeypatch.setattr(Generator, "answers", refuse)
    assert evaluate(config) == metrics


def test_a_folder_of_another_evaluation_is_refused(
    students: Callable[[str], Path], tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    config = evaluation(students("llava"), tmp_path)
    evaluate(config)
    other = dataclasses.replace(config, model=str(tiny_folder("llava")), max_new_tokens=5)
    with pytest.raises(CacheMismatchError, match=r"(?s)model_class.*max_new_tokens: stored 6"):
        evaluate(other)


def test_a_cache_that_is_not_there_is_refused_before_any_answer(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    config = evaluation(tiny_folder("llava"), tmp_path, cache=str(tmp_path / "nowhere"))
    with pytest.raises(IncompleteCacheError, match="nowhere is not a cache"):
        evaluate(config)
    assert not config.out.exists()


def test_bad_samples_of_the_source_are_all_listed(
    students: Callable[[str], Path], tmp_path: Path
) -> None:
    config = evaluation(students("llava"), tmp_path)
    (tmp_path / "data" / "tiny-0-0.png").unlink()
    (tmp_path / "data" / "tiny-3-1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"(?s)2 samples cannot be used.*tiny-0: .*tiny-3: "):
        evaluate(config)
    assert not config.out.exists()


def test_samples_that_the_processor_refuses_are_all_listed(
    students: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = SampleEncoder.encode_prompt

    def picky(self: SampleEncoder, sample: Sample) -> Any:
        if sample.source_id in ("tiny-1", "tiny-5"):
            raise SampleError(sample.source_id, "too long")
        return encode(self, sample)

    monkeypatch.setattr(SampleEncoder, "encode_prompt", picky)
    config = evaluation(students("llava"), tmp_path)
    with pytest.raises(ValueError, match=r"(?s)2 samples.*tiny-1: too long.*tiny-5: too long"):
        evaluate(config)
    assert not (config.out / "metrics.json").exists()


def test_identical_samples_are_all_answered(
    students: Callable[[str], Path], tmp_path: Path
) -> None:
    sample = tiny_samples(1)[0]
    config = evaluation(students("llava"), tmp_path)
    write_llava_json(tmp_path / "data", [sample] * 3)
    assert evaluate(config)["num_samples"] == 3
    assert [key for key, _, _ in _answers(config)] == [
        sample.key,
        f"{sample.key}-1",
        f"{sample.key}-2",
    ]


def test_a_cache_whose_pictures_cannot_be_drawn_is_refused_before_the_first_answer(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    samples = tiny_samples(3)
    built = small_build(tmp_path, samples, tiny_folder("llava"), settings_of("topk"), 256)
    build(built)
    other = tmp_path / "other"
    shutil.copytree(tiny_folder("llava"), other)
    text = json.loads((other / "tokenizer.json").read_text())
    text["model"]["merges"] = text["model"]["merges"][:-40]
    (other / "tokenizer.json").write_text(json.dumps(text))
    config = evaluation(other, tmp_path, cache=built.out)
    with pytest.raises(ValueError, match="text tokens differ from the cached"):
        evaluate(config)
    assert not config.out.exists()


@pytest.mark.parametrize("records", ["topk", "topk+sketch", "hidden"])
def test_pictures_show_the_matching_of_every_view(
    records: Any, students: Callable[[str], Path], tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    family = "llava_next" if records == "topk+sketch" else "llava"
    teacher, samples = tiny_folder(family), tiny_samples(5)
    built = small_build(tmp_path, samples, teacher, settings_of(records), 256)
    build(built)
    config = evaluation(students(family), tmp_path, cache=built.out, num_pictures=3)
    evaluate(config)
    pictures = json.loads((config.out / "pictures.json").read_text())
    assert pictures["metric"] == ("prob_l1" if records == "topk" else "raw_l1")
    # the third tiny sample is text alone and has no picture
    assert [s["source_id"] for s in pictures["samples"]] == ["tiny-0", "tiny-1", "tiny-3"]
    for sample in pictures["samples"]:
        for view in sample["views"]:
            teacher, student = view["teacher"], view["student"]
            assert len(teacher["tokens"]) == teacher["rows"] * teacher["cols"]
            assert len(student["tokens"]) == student["rows"] * student["cols"]
            ours, theirs = zip(*view["pairs"], strict=True)
            assert sorted(ours) == list(range(len(student["tokens"])))
            assert len(set(theirs)) == len(theirs)
            assert 0 <= min(theirs) <= max(theirs) < len(teacher["tokens"])
            assert all(0 < share <= 1 for _, share in teacher["tokens"] + student["tokens"])
            Image.open(io.BytesIO(base64.b64decode(sample["images"][view["image"]]))).verify()


def test_predictions_survive_any_text_and_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    found = [
        Prediction(key=str(i), source_id="s", answer=text, reference="r", seconds=0.5)
        for i, text in enumerate(["a\nb", "\u2028 \x85", '"', "\U0001f600"])
    ]
    append_predictions(path, found[:3])
    append_predictions(path, found[3:])
    assert read_predictions(path) == found
    for cut in (1, 40, len(path.read_bytes()) - 1):
        torn = tmp_path / f"torn-{cut}"
        torn.write_bytes(path.read_bytes()[:cut])
        before = read_predictions(torn)
        write_predictions(torn, before)
        append_predictions(torn, found[3:])
        assert read_predictions(torn) == [*before, found[3]]
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"answer", b"answes", 1) + whole.split(b"\n")[1] + b"\n")
    assert find_predictions(path).predictions == found[1:]
    assert len(find_predictions(path).problems) == 2
    with pytest.raises(
        ValueError, match=r"line 1 of .*predictions.jsonl is damaged.*evaluate again"
    ):
        read_predictions(path)
