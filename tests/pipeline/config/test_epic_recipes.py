"""EPIC's recipes: the demo's fit together, and differ in what they say they differ in."""

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.build.build import build
from pipeline.config import recipes
from pipeline.config.build import BuildConfig
from pipeline.config.stages import EvaluateConfig, TrainConfig
from pipeline.demo import recipes as demo_recipes
from pipeline.demo.config import DigitsConfig
from student_train.config.objective import ObjectiveName
from teacher_cache.schema.strict_json import decode_json
from tests.support.lazy import (
    AutoModelForImageTextToText,
    AutoProcessor,
    TeacherSettings,
    evaluate,
    train,
    train_demo_teacher,
    write_digits,
)

ARMS: tuple[tuple[ObjectiveName, bool], ...] = (
    ("epic-tcd", True),
    ("supervised", True),
    ("epic-tcd", False),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of digits, a teacher of one step and its cache."""
    root = tmp_path_factory.mktemp("epic")
    write_digits(DigitsConfig(out=root / "data", questions="rows", num_train=32, num_heldout=3))
    settings = TeacherSettings(
        vision_steps=1, vision_batch_size=8, language_steps=1, language_batch_size=8
    )
    teacher = train_demo_teacher(root / "data", root / "teacher", settings)
    source = root / "data/train.json"
    build(demo_recipes.demo_epic_cache(source=source, teacher=teacher, out=root / "cache"))
    return root


def student(objective: ObjectiveName, progressive: bool, root: Path = Path("r")) -> TrainConfig:
    return demo_recipes.demo_epic_student(
        cache=root / "cache",
        teacher=root / "teacher/final",
        out=root / f"{objective}-{progressive}",
        objective=objective,
        progressive=progressive,
        seed=3,
    )


@pytest.mark.parametrize(("objective", "progressive"), ARMS)
def test_the_demo_goes_from_rows_to_a_score_at_a_budget(
    root: Path, objective: ObjectiveName, progressive: bool
) -> None:
    final = train(student(objective, progressive, root).with_training(max_steps=1))
    plain = AutoModelForImageTextToText.from_pretrained(final)
    assert type(plain).__name__ == "LlavaForConditionalGeneration"
    metrics = evaluate(
        demo_recipes.demo_epic_evaluation(
            model=final,
            source=root / "data/heldout.json",
            out=final.parent / "eval-random-0.75",
            compressor="random",
            ratio=0.75,
        )
    )
    assert metrics["vision_tokens"] == {"before": 36.0, "kept": 9.0}


def test_arms_differ_in_the_loss_or_the_ratio_alone() -> None:
    def differing(one: TrainConfig, other: TrainConfig) -> set[str]:
        fields, others = ({**f.pop("training"), **f} for f in map(dataclasses.asdict, (one, other)))
        return {name for name, value in fields.items() if others[name] != value}

    tcd = student("epic-tcd", True)
    assert differing(tcd, student("supervised", True)) == {"objective", "out"}
    assert differing(tcd, student("epic-tcd", False)) == {"progression", "out"}


def test_the_demo_allows_exactly_the_tokens_of_an_answer(root: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(root / "teacher/final").tokenizer
    for entry in json.loads((root / "data/heldout.json").read_bytes()):
        answer = entry["conversations"][1]["value"] + tokenizer.eos_token
        assert len(tokenizer(answer)["input_ids"]) == demo_recipes.EPIC_ANSWER_TOKENS


def test_the_papers_training_states_the_papers_numbers() -> None:
    config = recipes.paper_epic(cache="c", student="hub/model", out=Path("o"))
    assert config.projector == "none"
    found = config.training
    assert (found.learning_rate, found.batch_size, found.epochs) == (2e-5, 256, 1.0)
    assert (found.warmup_ratio, found.min_lr_ratio, found.dtype) == (0.03, 0.0, "bfloat16")
    assert found.gradient_checkpointing
    assert found.train_parts == ("vision_tower", "projector", "language_model")
    assert found.objective.name == "epic-tcd"
    assert found.progression is not None
    assert (found.progression.preset, found.progression.compressor) == ("paper_notes", "dart")


def test_every_recipe_can_be_written_and_fed_back() -> None:
    out = Path("o")
    found: list[BuildConfig | TrainConfig | EvaluateConfig] = [
        demo_recipes.demo_epic_cache(source=Path("s.json"), teacher=Path("t"), out=out),
        *(student(objective, progressive) for objective, progressive in ARMS),
        demo_recipes.demo_epic_evaluation(
            model=Path("m"), source=Path("s.json"), out=out, compressor="dart", ratio=0.9
        ),
        recipes.paper_epic(cache=Path("c"), student="s", out=out),
    ]
    for config in found:
        text = json.dumps(dataclasses.asdict(config), default=str)
        assert decode_json(type(config), text, "recipe") == config
