"""Micro-batches of EPIC's step on tiny models, and its losses from two whole passes, in loops."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from student_train.compression.compression import compress
from student_train.config.progression import ProgressionConfig
from student_train.config.recipe import TrainerSettings
from student_train.data.stream import StudentBatch
from student_train.epic.step_plan import StepPlan, plan_step
from student_train.models.forward import final_hidden, output_head
from student_train.training.checkpoint import FinishedRun
from teacher_cache.encoding.collate import EncodedSample, ModelBatch
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.samples import TokenSpans
from teacher_cache.schema.teacher_output import TeacherOutput
from tests.support.deep import NUM_LAYERS, batch_of, deep_model
from tests.support.lazy import train_student, vanilla_student
from tests.support.tiny import FAMILIES


def fixed(compressor: str = "dart", layer: int = 2, ratio: float = 0.75) -> ProgressionConfig:
    """The same difficulty at every step."""
    return ProgressionConfig(preset="fixed", compressor=compressor, layer=layer, ratio=ratio)


def plan(progression: ProgressionConfig, step: int = 3, num_steps: int = 10) -> StepPlan:
    """What a step does to the four layers of `tests/support/deep.py`."""
    return plan_step(progression, seed=5, step=step, num_steps=num_steps, num_layers=NUM_LAYERS)


def text_output(spans: TokenSpans) -> TeacherOutput:
    """What a cache that knows nothing but the text has of a sample."""
    return TeacherOutput(
        views=spans.views,
        content_ids=spans.content_ids,
        is_response=spans.is_response,
        after_image=spans.after_image,
    )


def student_batch(
    samples: Sequence[EncodedSample],
    side: Literal["left", "right"] = "right",
    dtype: torch.dtype | None = None,
) -> StudentBatch:
    """The samples, and a cache that knows nothing but their text."""
    model = batch_of(samples, side)
    if dtype is not None:
        inputs = {n: v.to(dtype) if v.is_floating_point() else v for n, v in model.inputs.items()}
        model = replace(model, inputs=inputs)
    return StudentBatch(model=model, outputs=tuple(text_output(s.spans) for s in samples))


def two_passes(
    model: Any, batch: ModelBatch, step: StepPlan, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Supervised and KD term: every logit of both whole passes, one token after the other."""
    with compress(model, step.student, batch, step.student_draw) as student:
        logits = output_head(model)(final_hidden(model, batch.inputs))
    with torch.no_grad(), compress(model, step.teacher, batch, step.teacher_draw) as teacher:
        their_logits = output_head(model)(final_hidden(model, batch.inputs))
    supervised: list[Tensor] = []
    divergences: list[Tensor] = []
    for row, sample in enumerate(batch.samples):
        for position in sample.spans.response.tolist():
            before = torch.tensor([position - 1])
            mine = logits[row, int(student.layout.columns(row, before))]
            theirs = their_logits[row, int(teacher.layout.columns(row, before))]
            label = int(sample.inputs["input_ids"][position])
            supervised.append(-mine.log_softmax(dim=0)[label])
            log_q = (mine / temperature).log_softmax(dim=0)
            log_p = (theirs / temperature).log_softmax(dim=0)
            divergences.append(temperature**2 * (log_p.exp() * (log_p - log_q)).sum())
    return {
        "supervised": torch.stack(supervised).mean(),
        "kd": torch.stack(divergences).mean(),
    }


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Of every weight that the loss reaches."""
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def save_deep(folder: Path, family: str = "llava") -> Path:
    """A vanilla model of four layers on disk."""
    model, processor = deep_model(FAMILIES[family](folder / "base"))
    model.save_pretrained(folder / "deep")
    processor.save_pretrained(folder / "deep")
    return folder / "deep"


def train_vanilla(
    run: Path, reader: CacheReader, vanilla: Path, settings: TrainerSettings
) -> FinishedRun:
    """Train a vanilla model, whose tokens are dropped inside its language model alone."""
    load = partial(vanilla_student, str(vanilla), dtype=torch.float32)
    return train_student(run, reader, load, settings, student="vanilla")
