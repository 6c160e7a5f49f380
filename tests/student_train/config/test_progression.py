"""Settings of a progression that no model could carry out are refused where they are made."""

from dataclasses import replace
from typing import Any

import pytest

from student_train.config.objective import TERMS, ObjectiveConfig, preset
from student_train.config.progression import FIXED_GAP, ProgressionConfig
from student_train.config.recipe import TrainRecipe
from student_train.config.schedules import LayerSchedule, RatioRamps, TokenSchedule


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer": 0}, "layer is 0, expected 1 or more"),
        ({"schedule": "lcd", "preset": "released_code"}, "the released code has no lcd"),
        ({"icd_layers": (5,)}, "but the schedule is tcd"),
        ({"schedule": "icd", "icd_layers": (5, 9)}, "expected descending layers above 2"),
        ({"schedule": "icd", "icd_layers": (5, 2)}, "expected descending layers above 2"),
        ({"preset": "fixed"}, "needs a ratio"),
        ({"preset": "fixed", "ratio": 1.0}, "0 < ratio < 1"),
        ({"preset": "fixed", "ratio": 0.5, "schedule": "lcd"}, "drops at one layer throughout"),
        ({"preset": "fixed", "ratio": 0.5, "gap": -0.1}, "expected 0 <= gap < 1"),
        ({"ratio": 0.5}, "the preset paper_notes has its own ratios"),
        ({"gap": 0.5}, "gap is set"),
        ({"compressor": "random", "text": "released"}, "uses no text"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProgressionConfig(**fields)


def test_the_schedule_has_the_layer_and_the_ratios_of_the_settings() -> None:
    lcd = ProgressionConfig(schedule="lcd", layer=5).schedule_of(32)
    assert isinstance(lcd, LayerSchedule)
    assert (lcd.layer, lcd.num_layers) == (5, 32)
    fixed = ProgressionConfig(preset="fixed", ratio=0.6, layer=7).schedule_of(32)
    assert isinstance(fixed, TokenSchedule)
    assert isinstance(fixed.ratios, RatioRamps)
    assert fixed.layer == 7
    for progress in (0.0, 0.3, 1.0):
        assert fixed.ratios.at(progress, 0.7) == (0.6, round(0.6 - FIXED_GAP, 12))


def test_an_epic_objective_goes_with_its_own_schedule_and_others_with_any() -> None:
    for name in ("epic-tcd", "epic-cached-tcd"):
        TrainRecipe(objective=preset(name), progression=ProgressionConfig())
        for progression in (None, ProgressionConfig(schedule="lcd")):
            with pytest.raises(ValueError, match="goes with schedule 'tcd', found"):
                TrainRecipe(objective=preset(name), progression=progression)
    for name in ("supervised", "rld", "emkd"):
        for progression in (None, ProgressionConfig(), ProgressionConfig(schedule="icd")):
            TrainRecipe(objective=preset(name), progression=progression)


def test_epics_objectives_are_their_kd_term() -> None:
    objective = preset("epic-icd")
    weights = {term: getattr(objective, f"{term}_weight") for term in TERMS}
    assert weights == {"supervised": 0.3, "rld": 0.0, "kd": 0.7, "vsd": 0.0, "vlad": 0.0}
    assert (objective.epic_schedule, objective.kd_from_cache) == ("icd", False)
    assert preset("epic-cached-lcd").kd_from_cache
    assert preset("emkd").epic_schedule is None
    with pytest.raises(ValueError, match="is its kd term, found kd_weight 0"):
        replace(objective, kd_weight=0.0)
    with pytest.raises(ValueError, match=r"has no kd term, found kd_weight 0\.5"):
        ObjectiveConfig(kd_weight=0.5)
