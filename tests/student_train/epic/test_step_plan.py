"""What a step drops follows from its number alone; what no step could carry out is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from student_train.config.compression import CompressionSettings, DropStage
from student_train.config.progression import ProgressionConfig
from student_train.config.schedules import PAPER_NOTES
from student_train.data.seeded_random import random_uniform
from student_train.epic.step_plan import StepPlan, num_layers_of, plan_step, require_progression
from teacher_cache.schema.options import GridSettings
from tests.support.deep import deep_model
from tests.support.epic import fixed
from tests.support.paths import TinyFolder


def at(progression: ProgressionConfig, step: int, **changes: Any) -> StepPlan:
    values: dict[str, Any] = {"seed": 1, "num_steps": 8, "num_layers": 32, **changes}
    return plan_step(progression, step=step, **values)


# schedule, step of 8 -> layer; ratios are checked against the ramps
LAYERS = {
    ProgressionConfig(schedule="tcd"): [2, 2, 2, 2, 2, 2, 2, 2],
    ProgressionConfig(schedule="tcd", layer=5, preset="released_code"): [5] * 8,
    ProgressionConfig(schedule="lcd"): [32, 28, 25, 21, 17, 13, 10, 6],  # 32 - 3.75 t, halves up
    ProgressionConfig(schedule="lcd", layer=16): [32, 30, 28, 26, 24, 22, 20, 18],
    ProgressionConfig(schedule="icd"): [24, 24, 16, 16, 8, 8, 2, 2],
    ProgressionConfig(schedule="icd", icd_layers=(9,), layer=3): [9, 9, 9, 9, 3, 3, 3, 3],
}


@pytest.mark.parametrize("progression", list(LAYERS), ids=str)
def test_layers_are_the_schedules(progression: ProgressionConfig) -> None:
    plans = [at(progression, step) for step in range(8)]
    assert [plan.difficulty.layer for plan in plans] == LAYERS[progression]
    assert [plan.drops for plan in plans] == [layer < 32 for layer in LAYERS[progression]]


def test_a_plan_says_all_of_both_passes() -> None:
    progression = ProgressionConfig(compressor="fastv", text="released", layer=3)
    plan = at(progression, 6, seed=9)
    student, teacher = PAPER_NOTES.at(6 / 8, random_uniform(9, "ratio", 6))
    for found, ratio in ((plan.student, student), (plan.teacher, teacher)):
        stages = (DropStage(layer=3, ratio=ratio),)
        assert found == CompressionSettings(
            compressor="fastv", stages=stages, text="released", seed=9
        )
    assert (plan.difficulty.student_ratio, plan.difficulty.teacher_ratio) == (student, teacher)
    assert (plan.student_draw, plan.teacher_draw) == (12, 13)


def test_every_step_has_its_own_draws_and_a_seed_another_run() -> None:
    plans = [at(ProgressionConfig(), step) for step in range(8)]
    assert plans == [at(ProgressionConfig(), step) for step in range(8)]
    assert len({draw for p in plans for draw in (p.student_draw, p.teacher_draw)}) == 16
    other = [at(ProgressionConfig(), step, seed=2) for step in range(8)]
    for plan, another in zip(plans, other, strict=True):
        assert plan.difficulty.student_ratio != another.difficulty.student_ratio


@pytest.mark.parametrize(
    ("ratio", "gap", "student", "teacher"),
    [(0.75, None, 0.75, 0.45), (0.8, 0.2, 0.8, 0.6), (0.2, None, 0.2, 0.0), (0.9, 0.0, 0.9, 0.9)],
)
def test_fixed_is_one_difficulty_to_the_digit(
    ratio: float, gap: float | None, student: float, teacher: float
) -> None:
    progression = ProgressionConfig(preset="fixed", ratio=ratio, gap=gap)
    for step in range(8):
        difficulty = at(progression, step).difficulty
        assert (difficulty.student_ratio, difficulty.teacher_ratio) == (student, teacher)


def test_a_cached_teacher_has_seen_as_much_as_the_students_own_would() -> None:
    grid = GridSettings(compressor="dart", layer=2, ratios=(0.25, 0.5))

    def cached(progression: ProgressionConfig, step: int = 4) -> float:
        return at(progression, step, grid=grid).cached_ratio

    assert at(fixed(ratio=0.8), 0).cached_ratio == 0  # a cache without a grid
    assert [cached(fixed(ratio=ratio)) for ratio in (0.5, 0.55, 0.8, 0.95)] == [0, 0.25, 0.5, 0.5]
    assert cached(replace(fixed(ratio=0.7), gap=0.2)) == 0.5
    assert cached(fixed(ratio=0.8, layer=3)) == 0  # it dropped tokens that this student still had
    assert cached(replace(fixed(ratio=0.8), layer=1)) == 0.5
    assert cached(ProgressionConfig(schedule="lcd"), 0) == 0


@pytest.mark.parametrize(
    ("progression", "message"),
    [
        (ProgressionConfig(layer=4), "layer 4, but the decoder has 4 layers; choose .* 1 to 3"),
        (ProgressionConfig(schedule="lcd", layer=7), "has 4 layers; choose a layer from 1 to 3"),
        (ProgressionConfig(schedule="icd"), r"\(3, 2, 1, 2\) in a decoder of 4.*icd_layers"),
        (ProgressionConfig(schedule="icd", icd_layers=(9, 3)), r"\(9, 3, 2\) in a decoder of 4"),
        (ProgressionConfig(compressor="squeeze"), "squeeze"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_any_pass(
    progression: ProgressionConfig, message: str, llava: Path
) -> None:
    model, _ = deep_model(llava)
    model.forward = None  # whoever runs it fails
    require_progression(model, ProgressionConfig(), num_steps=10)
    with pytest.raises(ValueError, match=message):
        require_progression(model, progression, num_steps=10)


def test_every_layer_of_the_schedule_is_asked(llava: Path) -> None:
    """Attention that shows no keys at the layer where LCD is in the middle of its way."""

    class Opaque(nn.Module):
        pass

    model, _ = deep_model(llava)
    model.get_decoder().layers[2].self_attn = Opaque()
    lcd = ProgressionConfig(schedule="lcd", compressor="fastv", layer=1)
    for num_steps in (10, 3):
        with pytest.raises(ValueError, match=r"attention of layer 2, .* Opaque lacks q_proj"):
            require_progression(model, lcd, num_steps)
    require_progression(model, lcd, num_steps=1)  # nothing is dropped in the only step
    require_progression(model, replace(lcd, compressor="random"), num_steps=10)
    model.get_decoder().config.model_type = "gpt2"
    with pytest.raises(ValueError, match=r"the decoder of .* is a gpt2"):
        require_progression(model, ProgressionConfig(), num_steps=10)


def test_a_wrapped_model_has_the_depth_of_its_decoder(tiny_folder: TinyFolder) -> None:
    model, _ = deep_model(tiny_folder("qwen2_5_vl"))
    assert num_layers_of(model) == 4
    assert num_layers_of(torch.nn.DataParallel(model)) == 4
