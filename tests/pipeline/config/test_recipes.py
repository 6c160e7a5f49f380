"""The recipes: they fit together from data to score, and differ in what they say they differ in."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pipeline.build.build import build
from pipeline.config import recipes
from pipeline.config.build import BuildConfig
from pipeline.config.stages import EvaluateConfig, TrainConfig
from pipeline.demo import recipes as demo_recipes
from pipeline.demo.config import DigitsConfig
from student_train.config.objective import ObjectiveName
from teacher_cache.schema.strict_json import decode_json
from tests.support.lazy import (
    AutoProcessor,
    TeacherSettings,
    evaluate,
    load_student,
    train,
    train_demo_teacher,
    write_digits,
)

NUM_SAMPLES = 32
OBJECTIVES: tuple[ObjectiveName, ...] = ("supervised", "rld", "emkd")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a teacher of one step and its cache, each by the demo's own recipe."""
    root = tmp_path_factory.mktemp("demo")
    write_digits(DigitsConfig(out=root / "data", num_train=NUM_SAMPLES, num_heldout=3))
    settings = TeacherSettings(
        vision_steps=1, vision_batch_size=8, language_steps=1, language_batch_size=8
    )
    teacher = train_demo_teacher(root / "data", root / "teacher", settings)
    build(
        demo_recipes.demo_cache(
            source=root / "data/train.json", teacher=teacher, out=root / "cache"
        )
    )
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model, _ = load_student(str(folder))
    return model.state_dict()


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_demo_goes_from_data_to_a_score(
    root: Path, tmp_path: Path, objective: ObjectiveName
) -> None:
    config = demo_recipes.demo_student(
        cache=root / "cache",
        teacher=root / "teacher/final",
        out=tmp_path / "run",
        objective=objective,
        seed=0,
    )
    final = train(config.with_training(max_steps=1))
    frozen = {name for name in weights(final) if "vision_tower" in name}
    assert not changed(weights(root / "teacher/final"), weights(final)) & frozen
    metrics = evaluate(
        demo_recipes.demo_evaluation(
            model=final, source=root / "data/heldout.json", out=tmp_path / "eval"
        )
    )
    assert metrics["num_samples"] == 3
    assert set(metrics["scores"]) == {"word_accuracy"}


def test_the_papers_second_phase_goes_on_from_the_first(root: Path, tmp_path: Path) -> None:
    sizes = {"batch_size": 4, "micro_batch_size": 4, "max_steps": 1, "device": "cpu"}
    one = recipes.paper_phase_one(
        cache=root / "cache", student=str(root / "teacher/final"), out=tmp_path / "one"
    )
    adapted = train(one.with_training(warmup_ratio=0.0, **sizes))
    moved = changed(weights(root / "teacher/final"), weights(adapted))
    assert moved
    assert all("multi_modal_projector" in name for name in moved)

    two = recipes.paper_phase_two(cache=root / "cache", student=str(adapted), out=tmp_path / "two")
    final = train(two.with_training(warmup_ratio=0.0, **sizes))
    moved = changed(weights(adapted), weights(final))
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(part in name for name in moved)


def test_the_papers_phases_state_the_papers_numbers() -> None:
    one = recipes.paper_phase_one(cache=Path("c"), student="vanilla", out=Path("one")).training
    assert (one.train_parts, one.learning_rate, one.warmup_ratio) == (("projector",), 1e-3, 0.03)
    assert one.objective.name == "supervised"
    assert one.objective.rld_weight == one.objective.vsd_weight == one.objective.vlad_weight == 0
    two = recipes.paper_phase_two(cache=Path("c"), student="one/final", out=Path("two")).training
    assert (two.learning_rate, two.min_lr_ratio, two.warmup_ratio) == (1e-5, 0.0, 0.03)
    found = two.objective
    assert (found.supervised_weight, found.rld_weight) == (0.5, 0.5)
    assert (found.vsd_weight, found.vlad_weight) == (0.25, 25.0)


def test_the_demos_objectives_differ_in_the_loss_alone() -> None:
    def fields(objective: ObjectiveName) -> dict[str, object]:
        config = demo_recipes.demo_student(
            cache=Path("c"), teacher=Path("t"), out=Path("o"), objective=objective, seed=3
        )
        plain = dataclasses.asdict(config)
        return {**plain.pop("training"), **plain}

    base = fields("supervised")
    for objective in OBJECTIVES[1:]:
        other = fields(objective)
        assert {name for name in base if base[name] != other[name]} == {"objective"}


def test_the_demo_allows_exactly_the_tokens_of_an_answer(root: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(root / "teacher/final").tokenizer
    for entry in json.loads((root / "data/heldout.json").read_bytes()):
        answer = entry["conversations"][1]["value"] + tokenizer.eos_token
        assert len(tokenizer(answer)["input_ids"]) == demo_recipes.DEMO_ANSWER_TOKENS


def test_every_recipe_can_be_written_and_fed_back() -> None:
    student = demo_recipes.demo_student(
        cache=Path("c"), teacher=Path("t"), out=Path("o"), objective="emkd", seed=1
    )
    found: list[BuildConfig | TrainConfig | EvaluateConfig] = [
        demo_recipes.demo_cache(source=Path("s.json"), teacher=Path("t"), out=Path("o"), limit=4),
        student,
        demo_recipes.demo_evaluation(model=Path("m"), source=Path("s.json"), out=Path("o")),
        recipes.paper_phase_one(cache=Path("c"), student="hub/model", out=Path("o")),
        recipes.paper_phase_two(cache=Path("c"), student="s", out=Path("o")),
    ]
    for config in found:
        text = json.dumps(dataclasses.asdict(config), default=str)
        assert decode_json(type(config), text, "recipe") == config
