"""Recipes of the papers' trainings, complete: two runs of one differ in its arguments only.

Imports nothing heavy.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.stages import TrainConfig
from student_train.config.objective import ObjectiveName, preset
from student_train.config.progression import ProgressionConfig
from student_train.config.recipe import TrainerSettings

_ALL_PARTS = ("vision_tower", "projector", "language_model")
_SHARED = TrainerSettings(epochs=1.0, warmup_ratio=0.03, weight_decay=0.0, dtype="bfloat16")


def paper_phase_one(*, cache: str | Path, student: str, out: Path, seed: int = 0) -> TrainConfig:
    """Phase 1 of EM-KD: adapt the compressing projector alone, without distillation.

    `student` is a vanilla model. `cache` is any cache of the caption data (CC-558K in the paper;
    its records are not read, so k = 1 is enough). The paper does not state learning rate and batch
    size; these are LLaVA's.
    """
    training = _training(
        "supervised", seed=seed, train_parts=("projector",), batch_size=256, learning_rate=1e-3
    )
    return TrainConfig(cache=str(cache), student=student, out=out, training=training)


def paper_phase_two(*, cache: str | Path, student: str, out: Path, seed: int = 0) -> TrainConfig:
    """Phase 2 of EM-KD: train every part with all terms and the paper's weights.

    `student` is the `final` folder of phase 1. Learning rate and schedule are LLaVA-NeXT's (whose
    vision tower learns at a fifth of this rate; here, all parts share it).
    """
    training = _training(
        "emkd",
        seed=seed,
        train_parts=_ALL_PARTS,
        batch_size=128,
        learning_rate=1e-5,
        gradient_checkpointing=True,
    )
    return TrainConfig(cache=str(cache), student=student, out=out, training=training)


def paper_epic(*, cache: str | Path, student: str, out: Path, seed: int = 0) -> TrainConfig:
    """EPIC's training of LLaVA-1.5-7B on its 665,000 instructions: TCD, with DART.

    `student` is the vanilla model. Only the samples of the cache are read, so k = 1 is enough. The
    paper's vision tower learns at 2e-6, a tenth of the rate; here, all parts share one rate.
    """
    training = _training(
        "epic-tcd",
        progression=ProgressionConfig(schedule="tcd", preset="paper_notes", compressor="dart"),
        seed=seed,
        train_parts=_ALL_PARTS,
        batch_size=256,
        learning_rate=2e-5,
        gradient_checkpointing=True,
    )
    return TrainConfig(
        cache=str(cache), student=student, out=out, projector="none", training=training
    )


def _training(objective: ObjectiveName, **own: Any) -> TrainerSettings:
    return replace(_SHARED, objective=preset(objective), **own)
