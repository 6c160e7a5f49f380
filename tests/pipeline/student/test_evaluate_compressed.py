"""Evaluating with vision tokens dropped inside the language model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.__main__ import parse
from pipeline.config.build import SourceConfig
from pipeline.config.stages import EvaluateConfig
from pipeline.student.predictions import read_predictions
from student_train.compression.compressors import num_kept
from student_train.config.compression import CompressionSettings, DropStage
from teacher_cache.schema.checked_json import from_checked_json
from teacher_cache.schema.errors import CacheMismatchError
from tests.conftest import TinyFolder
from tests.support.deep import deep_model
from tests.support.lazy import evaluate
from tests.support.llava_json import evaluation

NUM_SAMPLES = 7
EVALUATE = "evaluate --model m --source s.json --out o"


@pytest.fixture(scope="module")
def model(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vanilla LLaVA of four decoder layers."""
    folder = tmp_path_factory.mktemp("deep")
    made, processor = deep_model(tiny_folder("llava"))
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def answers(config: EvaluateConfig) -> list[tuple[str, str]]:
    return [(p.key, p.answer) for p in read_predictions(config.out / "predictions.jsonl")]


@pytest.mark.parametrize("compressor", ["dart", "fastv", "random"])
def test_at_ratio_0_the_answers_are_those_without_compression(
    compressor: str, model: Path, tmp_path: Path
) -> None:
    plain = evaluation(model, tmp_path, "plain")
    zero = evaluation(model, tmp_path, "zero", compressor=compressor, ratio=0.0)
    before, after = evaluate(plain), evaluate(zero)
    assert answers(plain) == answers(zero)
    assert before["vision_tokens"] == after["vision_tokens"]
    assert before["vision_tokens"]["before"] == before["vision_tokens"]["kept"]


@pytest.mark.parametrize("settings", [{"ratio": 0.75}, {"stages": ("1:0.5", "3:0.5")}])
def test_metrics_tell_what_was_dropped(
    settings: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    config = evaluation(model, tmp_path, compressor="fastv", **settings)
    metrics = evaluate(config)
    assert metrics == from_checked_json((config.out / "metrics.json").read_bytes(), "metrics.json")
    assert config.compression is not None
    stages = [dataclasses.asdict(stage) for stage in config.compression.stages]
    assert metrics["compression"]["compressor"] == "fastv"
    assert metrics["compression"]["stages"] == stages
    found = read_predictions(config.out / "predictions.jsonl")
    assert {p.num_vision for p in found} > {0}  # text alone is among the samples
    for prediction in found:
        assert prediction.num_vision is not None
        kept = prediction.num_vision
        for stage in config.compression.stages:
            kept = num_kept(stage.ratio, kept)
        assert prediction.num_kept == kept
    total = sum(p.num_kept or 0 for p in found)
    assert (
        metrics["vision_tokens"]["kept"]
        == total / NUM_SAMPLES
        < 0.3 * sum(p.num_vision or 0 for p in found)
    )
    assert evaluate(config) == metrics


def test_answers_of_a_batch_are_those_of_one_by_one(model: Path, tmp_path: Path) -> None:
    batched = evaluation(model, tmp_path, "batched", compressor="random", ratio=0.75)
    single = evaluation(model, tmp_path, "single", compressor="random", ratio=0.75, batch_size=1)
    evaluate(batched)
    evaluate(single)
    assert answers(batched) == answers(single)


def test_other_compression_is_another_evaluation(model: Path, tmp_path: Path) -> None:
    config = evaluation(model, tmp_path, compressor="dart", ratio=0.75)
    evaluate(config)
    for change in ({"ratio": 0.5}, {"compress_layer": 1}, {"compress_text": "released"}):
        with pytest.raises(CacheMismatchError, match=r"compression"):
            evaluate(dataclasses.replace(config, **change))
    with pytest.raises(CacheMismatchError, match=r"compression.*wanted None"):
        evaluate(dataclasses.replace(config, compressor=None, ratio=None))


def test_folders_of_earlier_versions_are_evaluations_without_compression(
    model: Path, tmp_path: Path
) -> None:
    config = evaluation(model, tmp_path)
    metrics = evaluate(config)
    identity = from_checked_json((config.out / "evaluation.json").read_bytes(), "it")
    assert identity.pop("compression") is None
    (config.out / "evaluation.json").write_text(json.dumps(identity))
    path = config.out / "predictions.jsonl"
    lines = [from_checked_json(line, "it") for line in path.read_text().splitlines()]
    for line in lines:
        del line["num_vision"], line["num_kept"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    again = evaluate(config)
    assert again["scores"] == metrics["scores"]
    assert again["vision_tokens"] is None  # of the first three, nobody counted them
    with pytest.raises(CacheMismatchError, match="compression: stored None"):
        evaluate(dataclasses.replace(config, compressor="random", ratio=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compressor": "dart", "compress_layer": 5, "ratio": 0.5}, "has 4 layers; choose 1 to 3"),
        (
            {"compressor": "dart", "stages": ("2:0.5", "4:0.5")},
            "at layer 4 would have no effect",
        ),
        ({"compressor": "magic", "ratio": 0.5}, "compressor is 'magic', expected one of dart"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_any_answer(
    settings: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    config = evaluation(model, tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        evaluate(config)
    assert not config.out.exists()


def test_flags_become_stages() -> None:
    one: Any = parse(f"{EVALUATE} --compressor dart --compress-layer 3 --ratio 0.75".split())
    assert one.config.compression == CompressionSettings.at_layer(3, 0.75)
    pyramid: Any = parse(f"{EVALUATE} --compressor fastv --stages 8:0.5 16:0.25".split())
    assert pyramid.config.compression.stages == (
        DropStage(layer=8, ratio=0.5),
        DropStage(layer=16, ratio=0.25),
    )
    plain: Any = parse(EVALUATE.split())
    assert plain.config.compression is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.5}, "ratio would have no effect: compressor is not set"),
        ({"compress_layer": 3}, "compress_layer would have no effect"),
        ({"compressor": "dart"}, "needs a ratio .* or stages, one of them"),
        ({"compressor": "dart", "ratio": 0.5, "stages": ("2:0.5",)}, "one of them"),
        ({"compressor": "dart", "compress_layer": 3, "stages": ("2:0.5",)}, "name their layers"),
        ({"compressor": "dart", "ratio": 1.0}, "expected 0 <= ratio < 1"),
        ({"compressor": "dart", "stages": ("half",)}, "the stage 'half', expected LAYER:RATIO"),
        ({"compressor": "dart", "stages": ("8:0.5", "4:0.5")}, "expected ascending"),
        ({"compressor": "dart", "ratio": 0.5, "cache": "c"}, "before any are dropped"),
        ({"compressor": "fastv", "ratio": 0.5, "compress_seed": 1}, "fastv draws no random"),
        ({"compressor": "random", "ratio": 0.5, "compress_text": "released"}, "uses no text"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    source = SourceConfig(path="s.json")
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(model="m", source=source, out=Path("o"), **settings)
