"""From a source to a report, without Ray: every stage on what the stage before it wrote.

Real small models, all kinds of samples (several turns, several images, text alone, a system
message), both shard formats, both tiers that EM-KD is trained from.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.build.build import build
from pipeline.config.stages import ReportConfig, TrainConfig
from pipeline.inspection.cache import describe_cache
from student_train.config.objective import ObjectiveName, preset
from student_train.config.recipe import TrainerSettings
from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.verify import verify_cache
from teacher_cache.schema.options import RecordKind, RecordSettings, ShardFormatName
from tests.support.lazy import AutoModelForImageTextToText, evaluate, train, write_report
from tests.support.llava_json import evaluation, settings_of, small_build
from tests.support.paths import TinyFolder
from tests.support.tiny import tiny_samples

NUM_SAMPLES = 5


def _train(cache: Path, model: Path, out: Path, objective: ObjectiveName) -> Path:
    return train(
        TrainConfig(
            cache=str(cache),
            student=str(model),
            out=out,
            training=TrainerSettings(
                objective=preset(objective),
                max_steps=3,
                batch_size=4,
                micro_batch_size=2,
                learning_rate=1e-3,
                device="cpu",
                log_steps=1,
                grad_norm_steps=2,
            ),
        )
    )


@pytest.mark.parametrize(
    ("family", "form", "records"),
    [
        ("llava", "webdataset", "topk+sketch"),
        ("llava_next", "arrow", "topk+sketch"),
        ("llava_next", "webdataset", "hidden"),
    ],
)
def test_a_source_becomes_a_student_and_a_report(
    tiny_folder: TinyFolder,
    tmp_path: Path,
    family: str,
    form: ShardFormatName,
    records: RecordKind,
) -> None:
    model, cache = tiny_folder(family), tmp_path / "cache"
    samples, settings = tiny_samples(NUM_SAMPLES), settings_of(records)
    seal = build(small_build(tmp_path, samples, model, settings, 2, format=form))
    assert verify_cache(cache).problems == ()
    assert describe_cache(CacheReader.open(cache))["samples"] == seal.num_samples == NUM_SAMPLES

    runs: list[Path] = []
    for objective in ("supervised", "emkd"):
        run = tmp_path / objective
        final = _train(cache, model, run, objective)
        metrics = evaluate(
            evaluation(
                final,
                tmp_path,
                f"{objective}/eval",
                num_samples=NUM_SAMPLES,
                max_new_tokens=3,
                cache=str(cache),
                num_pictures=NUM_SAMPLES,
            )
        )
        assert metrics["num_samples"] == NUM_SAMPLES
        runs.append(run)

    student = AutoModelForImageTextToText.from_pretrained(tmp_path / "emkd" / "final")
    assert student.config.model_type == f"emkd_avgpool_{family}"
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for term in ("supervised", "rld", "vsd", "vlad"):
        assert all(0 < line[f"term/{term}"] < float("inf") for line in lines)
        assert lines[1][f"gradient/{term}"] > 0
    pictures = json.loads((runs[1] / "eval" / "pictures.json").read_text())
    assert [len(sample["images"]) for sample in pictures["samples"]] == [1, 1, 2, 1]
    for view in (view for sample in pictures["samples"] for view in sample["views"]):
        num_student = view["student"]["rows"] * view["student"]["cols"]
        num_teacher = view["teacher"]["rows"] * view["teacher"]["cols"]
        assert num_student < num_teacher
        assert len({i for i, _ in view["pairs"]}) == len({j for _, j in view["pairs"]})
        assert len(view["pairs"]) == num_student

    page = tmp_path / "report.html"
    assert write_report(ReportConfig(runs=tuple(runs), out=page)) == []
    text = page.read_text()
    assert seal.fingerprint[:12] in text
    assert "supervised" in text


def test_the_same_settings_give_the_same_student_from_either_format(
    llava: Path, tmp_path: Path
) -> None:
    weights: list[bytes] = []
    config = small_build(tmp_path, tiny_samples(NUM_SAMPLES), llava, RecordSettings(top_k=8), 256)
    forms: tuple[ShardFormatName, ...] = ("arrow", "webdataset")
    for form in forms:
        cache = tmp_path / form
        build(dataclasses.replace(config, out=str(cache), format=form))
        final = _train(cache, llava, tmp_path / f"run-{form}", "emkd")
        weights.append((final / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
