"""Recipes of the demos: complete settings of their stages.

They pin CPU, float32 and one thread of torch, where results repeat to the bit. Students differ in
their objective alone (EPIC's also in whether the ratio grows). Sizes are such that the teacher is
clearly better than the supervised student; nothing was tuned for a distilled student.
"""

import dataclasses
from pathlib import Path

from pipeline.config.build import BuildConfig, SourceConfig
from pipeline.config.stages import EvaluateConfig, TrainConfig
from student_train.config.objective import ObjectiveName, preset
from student_train.config.progression import ProgressionConfig
from student_train.config.recipe import TrainerSettings

DEMO_STRIDE = 2
DEMO_STEPS = 260
DEMO_ANSWER_TOKENS = 17
"""Eight names, eight digits and the end of the turn."""
EPIC_LAYER = 1
"""Tokens are dropped at the input of the last of the decoder's two layers."""
EPIC_FIXED_RATIO = 0.75
"""Of runs without progression: about the mean of the final ratios of `paper_notes`' ramps."""
EPIC_ANSWER_TOKENS = 9
"""Four names, four digits and the end of the turn."""


def demo_cache(
    *, source: Path, teacher: Path, out: str | Path, limit: int | None = None
) -> BuildConfig:
    """The default records (top-k and sketch) of the demo's teacher for `limit` samples."""
    return BuildConfig(
        source=SourceConfig(path=str(source), limit=limit),
        teacher=str(teacher),
        out=str(out),
        batch_size=32,
        device="cpu",
        dtype="float32",
        torch_threads=1,
    )


def demo_student(
    *, cache: str | Path, teacher: Path, out: Path, objective: ObjectiveName, seed: int
) -> TrainConfig:
    """One student of the demo: 9 vision tokens instead of 36, initialised from the teacher.

    The vision tower stays frozen, as in LLaVA-1.5 and as it was for the teacher.
    """
    return TrainConfig(
        cache=str(cache),
        student=str(teacher),
        out=out,
        stride=DEMO_STRIDE,
        torch_threads=1,
        training=TrainerSettings(
            objective=preset(objective),
            train_parts=("projector", "language_model"),
            seed=seed,
            max_steps=DEMO_STEPS,
            batch_size=32,
            micro_batch_size=32,
            learning_rate=3e-3,
            min_lr_ratio=0.05,
            warmup_ratio=0.0,
            weight_decay=0.01,
            adam_beta2=0.98,
            device="cpu",
            loader_threads=1,
            save_steps=65,
            log_steps=10,
            grad_norm_steps=20,
        ),
    )


def demo_evaluation(
    *, model: Path, source: Path, out: Path, cache: str | Path | None = None
) -> EvaluateConfig:
    """Generate the held-out answers; `word_accuracy` is the accuracy of digits in named cells."""
    return EvaluateConfig(
        model=str(model),
        source=SourceConfig(path=str(source)),
        out=out,
        batch_size=64,
        max_new_tokens=DEMO_ANSWER_TOKENS,
        scores=("word_accuracy",),
        device="cpu",
        dtype="float32",
        cache=None if cache is None else str(cache),
        torch_threads=1,
    )


def demo_epic_cache(*, source: Path, teacher: Path, out: str | Path) -> BuildConfig:
    """A cache of the samples with one logit each: EPIC's teacher is the student itself."""
    cache = demo_cache(source=source, teacher=teacher, out=out)
    return cache.with_settings(records="topk", top_k=1)


def demo_epic_student(
    *,
    cache: str | Path,
    teacher: Path,
    out: Path,
    objective: ObjectiveName,
    progressive: bool,
    seed: int,
) -> TrainConfig:
    """Continues the demo's teacher with 36 vision tokens; with time, fewer of them pass layer 0.

    Not `progressive`: three quarters are dropped at every step.
    """
    plain = demo_student(cache=cache, teacher=teacher, out=out, objective="supervised", seed=seed)
    progression = ProgressionConfig(layer=EPIC_LAYER)
    if not progressive:
        progression = dataclasses.replace(progression, preset="fixed", ratio=EPIC_FIXED_RATIO)
    plain = plain.with_training(objective=preset(objective), progression=progression)
    return dataclasses.replace(plain, projector="none")


def demo_epic_evaluation(
    *,
    model: Path,
    source: Path,
    out: Path,
    compressor: str | None = None,
    ratio: float | None = None,
) -> EvaluateConfig:
    """Read the held-out rows with all vision tokens, or with a share dropped after layer 0."""
    plain = demo_evaluation(model=model, source=source, out=out)
    plain = dataclasses.replace(plain, max_new_tokens=EPIC_ANSWER_TOKENS)
    if compressor is None:
        return plain
    return dataclasses.replace(plain, compressor=compressor, compress_layer=EPIC_LAYER, ratio=ratio)
