"""Whether loading or learning is what the demo's student waits for.

A teacher of the demo's sizes (barely trained: its numbers do not matter, its sizes do), a cache of
its outputs, and a student of it that takes optimizer steps with the demo's settings. `loader` is
what one process reads, decodes, encodes and collates; `student` is what the steps consume when
batches cost nothing. Both on one thread.
"""

import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from pipeline import recipes
from pipeline.config import DigitsConfig, SourceConfig
from pipeline.demo_teacher import TeacherSettings, train_demo_teacher
from pipeline.digits import write_digits
from pipeline.sources import open_source
from student_train.signals import TeacherAssets
from student_train.stream import BatchPlan, StudentBatch, TrainingStream
from student_train.student import set_trainable, student_from_vanilla
from student_train.trainer import student_loss
from teacher_cache.reader import CacheReader
from teacher_cache.records import RecordSettings
from teacher_cache.teacher import Teacher
from teacher_cache.tokens import SampleEncoder
from tests.caches import build_cache

SKETCH_RANK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Samples per second of one process."""

    loader: float
    student: float

    @property
    def ratio(self) -> float:
        """How many students one loader could feed."""
        return self.loader / self.student


def measure(num_samples: int, num_steps: int) -> Throughput:
    """Build the miniature, then time loading and learning in turns."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
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
        return _measure(reader, teacher, root, num_steps)


def _measure(reader: CacheReader, teacher: Path, root: Path, num_steps: int) -> Throughput:
    config = recipes.demo_student(
        cache=root / "cache", teacher=teacher, out=root / "run", objective="emkd", seed=0
    )
    settings = config.settings
    model, processor = student_from_vanilla(
        str(teacher), config.projector, config.stride, dtype=torch.float32
    )
    set_trainable(model, settings.train_parts)
    encoder = SampleEncoder(processor, model.config, reader.spec.system_prompt)
    stream = TrainingStream(
        reader,
        encoder.encode,
        objective=settings.objective,
        pad_token_id=encoder.pad_token_id,
        seed=0,
        plan=BatchPlan(batch_size=settings.batch_size, micro_batch_size=settings.micro_batch_size),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    assets = TeacherAssets(sketch=reader.sketch_basis())

    def step(batch: StudentBatch) -> None:
        student_loss(model, batch, settings, assets).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    batches = iter(stream)
    step(next(batches))
    loading = learning = float("inf")
    for _ in range(num_steps):
        started = time.process_time()
        (batch,) = islice(batches, 1)
        loaded = time.process_time()
        step(batch)
        loading = min(loading, loaded - started)
        learning = min(learning, time.process_time() - loaded)
    size = settings.micro_batch_size
    return Throughput(loader=size / loading, student=size / learning)
