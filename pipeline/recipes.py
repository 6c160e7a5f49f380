"""Complete recipes as functions: every number of the demo's stages and of the paper's two phases.

Promises: a recipe names its inputs and outputs and decides all the rest, so that two runs of one
recipe differ in their arguments only. The demo's recipes pin CPU, float32 and one thread of
torch, where bits repeat; its three objectives share every number but the loss. Their sizes were
chosen so that teacher and supervised student are clearly apart and the demo takes minutes;
nothing was tuned for a distilled student. Imports nothing heavy.
"""

from pathlib import Path

from pipeline.config import BuildConfig, EvaluateConfig, SourceConfig, TrainConfig
from student_train.objective import ObjectiveName, preset

DEMO_STRIDE = 2
DEMO_STEPS = 260
DEMO_ANSWER_TOKENS = 17
"""Eight names, eight digits and the end of the turn."""


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
    """One student of the demo: 9 vision tokens instead of 36, begun from the teacher's weights.

    The vision tower stays frozen, as in LLaVA-1.5 and as it was for the teacher.
    """
    return TrainConfig(
        cache=str(cache),
        student=str(teacher),
        out=out,
        stride=DEMO_STRIDE,
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
        torch_threads=1,
        loader_threads=1,
        save_steps=65,
        log_steps=10,
        grad_norm_steps=20,
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


def paper_phase_one(*, cache: str | Path, student: str, out: Path, seed: int = 0) -> TrainConfig:
    """Phase 1 of EM-KD: adapt the compressing projector alone, without distillation.

    `student` is a vanilla model, the cache any one of the caption data (CC-558K in the paper; its
    records are not read, k = 1 does). Rate and batch are LLaVA's, the paper leaves them open.
    """
    return TrainConfig(
        cache=str(cache),
        student=student,
        out=out,
        objective=preset("supervised"),
        train_parts=("projector",),
        seed=seed,
        epochs=1.0,
        batch_size=256,
        learning_rate=1e-3,
        warmup_ratio=0.03,
        weight_decay=0.0,
        dtype="bfloat16",
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
    )
