"""Complete recipes as functions: every number of the demos' stages and of the papers' trainings.

Promises: a recipe names its inputs and outputs and decides all the rest, so that two runs of one
recipe differ in their arguments only. The demos' recipes pin CPU, float32 and one thread of
torch, where bits repeat; their objectives share every number but the loss (and EPIC's, whether
the ratio grows). Sizes were chosen so that teacher and supervised student are clearly apart and a
demo takes minutes; nothing was tuned for a distilled student. Imports nothing heavy.
"""

from pathlib import Path

from pipeline.config.stages import TrainConfig
from student_train.config.objective import preset
from student_train.config.progression import ProgressionConfig
from student_train.config.recipe import TrainerSettings


def paper_phase_one(*, cache: str | Path, student: str, out: Path, seed: int = 0) -> TrainConfig:
    """Phase 1 of EM-KD: adapt the compressing projector alone, without distillation.

    `student` is a vanilla model, the cache any one of the caption data (CC-558K in the paper; its
    records are not read, k = 1 does). Rate and batch are LLaVA's, the paper leaves them open.
    """
    return TrainConfig(
        cache=str(cache),
        student=student,
        out=out,
        training=TrainerSettings(
            objective=preset("supervised"),
            train_parts=("projector",),
            seed=seed,
            epochs=1.0,
            batch_size=256,
            learning_rate=1e-3,
            warmup_ratio=0.03,
            weight_decay=0.0,
            dtype="bfloat16",
        ),
    )


def paper_phase_two(*, cache: str | Path, student: str, out: Path, seed: int = 0) -> TrainConfig:
    """Phase 2 of EM-KD: train every part with the whole objective and the paper's weights.

    `student` is the `final` folder of phase 1. Rate and schedule are LLaVA-NeXT's (there, the
    vision tower learns at a fifth of this rate; here, all parts share it).
    """
    return TrainConfig(
        cache=str(cache),
        student=student,
        out=out,
        training=TrainerSettings(
            objective=preset("emkd"),
            train_parts=("vision_tower", "projector", "language_model"),
            seed=seed,
            epochs=1.0,
            batch_size=128,
            learning_rate=1e-5,
            warmup_ratio=0.03,
            weight_decay=0.0,
            dtype="bfloat16",
            gradient_checkpointing=True,
        ),
    )


def paper_epic(*, cache: str | Path, student: str, out: Path, seed: int = 0) -> TrainConfig:
    """EPIC's training of LLaVA-1.5-7B on its 665,000 instructions, token-wise, with DART.

    `student` is the vanilla model; of the cache only the samples are read, k = 1 does. The paper's
    vision tower learns at 2e-6, a tenth of the rate; here, all parts share one.
    """
    return TrainConfig(
        cache=str(cache),
        student=student,
        out=out,
        projector="none",
        training=TrainerSettings(
            objective=preset("epic-tcd"),
            progression=ProgressionConfig(schedule="tcd", preset="paper_notes", compressor="dart"),
            train_parts=("vision_tower", "projector", "language_model"),
            seed=seed,
            epochs=1.0,
            batch_size=256,
            learning_rate=2e-5,
            warmup_ratio=0.03,
            weight_decay=0.0,
            dtype="bfloat16",
            gradient_checkpointing=True,
        ),
    )
