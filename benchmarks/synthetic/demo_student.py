"""Makes the demo's student and its cache, for benchmarks of a training step.

A teacher of the demo's sizes (barely trained: only sizes matter), a cache of its outputs, and a
student with the demo's settings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config.build import SourceConfig
from pipeline.demo import recipes
from pipeline.demo.config import DigitsConfig
from pipeline.demo.digits import write_digits
from pipeline.demo.teacher import TeacherSettings, train_demo_teacher
from pipeline.sources.source import open_source
from student_train.config.recipe import TrainerSettings
from student_train.data.batch_plan import BatchPlan
from student_train.data.stream import StudentBatch, TrainingStream
from student_train.models.student import student_from_vanilla
from student_train.training.student_loss import student_loss
from student_train.training.trainable import set_trainable
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.options import RecordSettings
from teacher_cache.teacher.teacher import Teacher
from tests.support.caches import build_cache

SKETCH_RANK = 32


@dataclass(frozen=True, kw_only=True)
class Miniature:
    """EM-KD in the demo's sizes: the batches, and the optimizer step."""

    stream: TrainingStream
    settings: TrainerSettings
    step: Callable[[StudentBatch], None]


def make_miniature(root: Path, num_samples: int) -> Miniature:
    """Build everything under `root`; takes seconds."""
    write_digits(DigitsConfig(out=root / "data", num_train=num_samples, num_heldout=2))
    teacher = train_demo_teacher(
        root / "data", root / "teacher", TeacherSettings(vision_steps=4, language_steps=8)
    )
    source = open_source(SourceConfig(path=str(root / "data" / "train.json")))
    reader = build_cache(
        root / "cache",
        Teacher.load(str(teacher), device="cpu", dtype="float32"),
        [source[index] for index in range(len(source))],
        RecordSettings(records="topk+sketch", top_k=64, sketch_rank=SKETCH_RANK),
        samples_per_shard=64,
    )
    config = recipes.demo_student(
        cache=root / "cache", teacher=teacher, out=root / "run", objective="emkd", seed=0
    )
    settings = config.training
    model, processor = student_from_vanilla(str(teacher), stride=config.stride, dtype=torch.float32)
    set_trainable(model, settings.train_parts)
    spec = reader.spec
    encoder = SampleEncoder(processor, model.config, spec.system_prompt, spec.text, spec.pictures)
    stream = TrainingStream(
        reader,
        encoder.encode,
        objective=settings.objective,
        tier="topk+sketch",
        pad_token_id=encoder.pad_token_id,
        seed=0,
        plan=BatchPlan(batch_size=settings.batch_size, micro_batch_size=settings.micro_batch_size),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    assets = TeacherAssets(sketch=reader.sketch_basis(), template=reader.tail_template())

    def step(batch: StudentBatch) -> None:
        student_loss(model, batch, settings.objective, assets).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Miniature(stream=stream, settings=settings, step=step)
