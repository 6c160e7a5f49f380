"""EPIC's schedules against tables worked out by hand, and what they refuse."""

from typing import Any

import pytest

from student_train.config.schedules import (
    Difficulty,
    IntegratedSchedule,
    LayerSchedule,
    Ramp,
    RatioRamps,
    ScheduleName,
    SchedulePreset,
    TokenSchedule,
    schedule_preset,
)
from student_train.data.seeded_random import random_uniform

# progress, draw, layer, student's ratio, teacher's ratio
# Paper notes: high 0.05 -> 0.9, low 0 -> 0.5, gap 0.05 -> 0.3, all linear.
PAPER_TCD = [
    (0.0, 0.0, 2, 0.0, 0.0),
    (0.0, 0.5, 2, 0.025, 0.0),
    (0.2, 0.25, 2, 0.13, 0.03),  # 0.1 .. 0.22, gap 0.1
    (0.5, 0.5, 2, 0.3625, 0.1875),  # 0.25 .. 0.475, gap 0.175
    (1.0, 0.0, 2, 0.5, 0.2),
    (1.0, 0.5, 2, 0.7, 0.4),
]
# Released code: high 0.1 + 0.64 p, low 0.1 + 0.16 p, gap min(0.3, 0.1 + 0.5 p).
RELEASED_TCD = [
    (0.0, 0.5, 2, 0.1, 0.0),
    (0.2, 0.5, 2, 0.18, 0.0),  # 0.132 .. 0.228, gap 0.2
    (0.4, 0.5, 2, 0.26, 0.0),  # 0.164 .. 0.356, gap 0.3
    (0.5, 0.75, 2, 0.36, 0.06),  # 0.18 .. 0.42, gap 0.3
    (1.0, 0.0, 2, 0.26, 0.0),
    (1.0, 0.5, 2, 0.5, 0.2),
]
# Layer = round(32 - 30 p), student 0.2 .. 0.9, gap as in TCD.
PAPER_LCD = [
    (0.0, 0.0, 32, 0.2, 0.15),
    (0.01, 0.0, 32, 0.2, 0.1475),  # 31.7
    (0.05, 0.0, 31, 0.2, 0.1375),  # 30.5, up
    (0.5, 0.5, 17, 0.55, 0.375),
    (0.99, 0.5, 2, 0.55, 0.2525),  # 2.3
    (1.0, 0.5, 2, 0.55, 0.25),
]
# Layers 24, 16, 8, 2 for a quarter each, with TCD's ramps inside.
PAPER_ICD = [
    (0.0, 0.5, 24, 0.025, 0.0),
    (0.125, 0.5, 24, 0.3625, 0.1875),
    (0.25, 0.5, 16, 0.025, 0.0),
    (0.3, 0.25, 16, 0.13, 0.03),
    (0.625, 0.5, 8, 0.3625, 0.1875),
    (0.75, 0.5, 2, 0.025, 0.0),
    (1.0, 0.5, 2, 0.7, 0.4),
]


@pytest.mark.parametrize(
    ("name", "kind", "table"),
    [
        ("paper_notes", "tcd", PAPER_TCD),
        ("released_code", "tcd", RELEASED_TCD),
        ("paper_notes", "lcd", PAPER_LCD),
        ("paper_notes", "icd", PAPER_ICD),
    ],
)
def test_presets_are_the_tables(name: SchedulePreset, kind: ScheduleName, table: Any) -> None:
    schedule = schedule_preset(name, kind, num_layers=32)
    for progress, draw, layer, student, teacher in table:
        found = schedule.at(progress, draw)
        where = f"progress {progress}, draw {draw}"
        assert found.layer == layer, where
        assert found.student_ratio == pytest.approx(student, abs=1e-12), where
        assert found.teacher_ratio == pytest.approx(teacher, abs=1e-12), where


@pytest.mark.parametrize("kind", ["tcd", "lcd", "icd"])
def test_resuming_continues_the_same_draws(kind: ScheduleName) -> None:
    schedule = schedule_preset("paper_notes", kind, num_layers=32)

    def steps(first: int) -> list[Difficulty]:
        return [schedule.at(t / 20, random_uniform(3, "ratio", t)) for t in range(first, 21)]

    assert steps(0)[7:] == steps(7)
    assert len({step.student_ratio for step in steps(0)}) == 21


@pytest.mark.parametrize("kind", ["tcd", "lcd", "icd"])
def test_ratios_are_always_ratios_and_the_teacher_drops_no_more(kind: ScheduleName) -> None:
    schedule = schedule_preset("paper_notes", kind, num_layers=28)
    for step in range(201):
        for draw in (0.0, 0.5, 1 - 2**-53):
            found = schedule.at(step / 200, draw)
            assert 0 <= found.teacher_ratio <= found.student_ratio < 1
            assert 2 <= found.layer <= 28


def test_the_released_code_has_no_layer_schedule() -> None:
    with pytest.raises(ValueError, match="has no lcd, only tcd"):
        schedule_preset("released_code", "lcd", 32)


def test_settings_that_are_no_schedule_are_refused() -> None:
    flat = Ramp(start=0.5, end=0.5)
    with pytest.raises(ValueError, match=r"end of a ramp is 1\.0"):
        Ramp(start=0.0, end=1.0)
    with pytest.raises(ValueError, match="reaches its end at progress 0"):
        Ramp(start=0.0, end=0.5, until=0.0)
    with pytest.raises(ValueError, match="is above high"):
        RatioRamps(low=flat, high=Ramp(start=0.4, end=0.9), gap=flat)
    ramps = RatioRamps(low=flat, high=flat, gap=flat)
    with pytest.raises(ValueError, match="layers are"):
        IntegratedSchedule(ratios=ramps, layers=(8, 16))
    with pytest.raises(ValueError, match="layers are"):
        schedule_preset("paper_notes", "icd", num_layers=8)
    with pytest.raises(ValueError, match="layer is 9, expected 1 to 8"):
        LayerSchedule(ratios=ramps, num_layers=8, layer=9)
    for progress, draw in ((-0.1, 0.0), (1.1, 0.0), (0.5, 1.0)):
        with pytest.raises(ValueError, match="expected"):
            TokenSchedule(ratios=ramps).at(progress, draw)
