"""What of a training step's time matching takes, where threads solve it and where nobody helps.

    python -m benchmarks.matching_step [--steps 12]

A teacher of the demo's sizes (barely trained: its numbers do not matter, its sizes do), a cache of
its outputs, and a student that takes EM-KD's optimizer steps with the demo's settings. `costs` are
computed by the training thread; `solving` is the assignments' own time; `waiting` is what the
training thread spends asking for them. In threads solving goes on beside the response's pass
through the head; inline the same calls are made one after the other. Visible is what is left of all
of it in the training thread. Costs and steps are its processor time, the others wall time; medians.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.student import SKETCH_RANK
from pipeline import recipes
from pipeline.config import DigitsConfig, SourceConfig
from pipeline.demo_teacher import TeacherSettings, train_demo_teacher
from pipeline.digits import write_digits
from pipeline.sources import open_source
from student_train import losses, matching, vision_matching
from student_train.signals import TeacherAssets
from student_train.stream import BatchPlan, StudentBatch, TrainingStream
from student_train.student import set_trainable, student_from_vanilla
from student_train.trainer import student_loss
from teacher_cache.reader import CacheReader
from teacher_cache.records import RecordSettings
from teacher_cache.teacher import Teacher
from teacher_cache.tokens import SampleEncoder
from tests.caches import build_cache


class Inline(Executor):
    """Solves at once, in the thread that asks."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Done when it returns."""
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


@dataclass(kw_only=True)
class Clock:
    """Seconds of each step, by what they went to."""

    costs: list[float] = field(default_factory=list[float])
    solving: list[float] = field(default_factory=list[float])
    waiting: list[float] = field(default_factory=list[float])
    steps: list[float] = field(default_factory=list[float])

    def watch(self, name: str, work: Callable[..., Any], clock: Callable[[], float]) -> Any:
        """`work`, whose time is added to the current step's."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            found = work(*args, **kwargs)
            getattr(self, name)[-1] += clock() - start
            return found

        return watched

    def line(self) -> str:
        """Medians in ms, and the visible share."""
        costs, solving, waiting, steps = (
            1e3 * statistics.median(each[2:])
            for each in (self.costs, self.solving, self.waiting, self.steps)
        )
        return (
            f"step {steps:8.2f} ms   costs {costs:6.2f}   solving {solving:6.2f}   waiting "
            f"{waiting:6.2f}   visible {(costs + waiting) / steps:6.2%}"
        )


def measure(reader: CacheReader, teacher: Path, root: Path, num_steps: int) -> dict[str, Clock]:
    """Steps in threads and inline, in turns."""
    config = recipes.demo_student(
        cache=root / "cache", teacher=teacher, out=root / "run", objective="emkd", seed=0
    )
    settings = config.settings
    model, processor = student_from_vanilla(
        str(teacher), config.projector, config.stride, dtype=torch.float32
    )
    set_trainable(model, settings.train_parts)
    encoder = SampleEncoder(processor, model.config, reader.spec.system_prompt)
    plan = BatchPlan(batch_size=settings.batch_size, micro_batch_size=settings.micro_batch_size)
    batches = iter(
        TrainingStream(
            reader,
            encoder.encode,
            objective=settings.objective,
            pad_token_id=encoder.pad_token_id,
            seed=0,
            plan=plan,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    assets = TeacherAssets(sketch=reader.sketch_basis())

    def step(batch: StudentBatch) -> None:
        student_loss(model, batch, settings, assets).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    solve, result = matching.solve_assignment, vision_matching.PendingBatch.result
    start, solvers = vision_matching.start_batch_matching, matching._solvers  # pyright: ignore[reportPrivateUsage]
    clocks = {"threads": Clock(), "inline": Clock()}
    for _ in range(num_steps):
        batch = next(batches)
        for way, clock in clocks.items():
            for each in vars(clock).values():
                each.append(0.0)
            matching.solve_assignment = clock.watch("solving", solve, time.perf_counter)
            losses.start_batch_matching = clock.watch("costs", start, time.thread_time)
            vision_matching.PendingBatch.result = clock.watch("waiting", result, time.perf_counter)
            matching._solvers = Inline if way == "inline" else solvers  # pyright: ignore
            begin = time.thread_time()
            step(batch)
            clock.steps[-1] = time.thread_time() - begin
    return clocks


def main() -> None:
    """Print both lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_digits(DigitsConfig(out=root / "data", num_train=256, num_heldout=2))
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
        for way, clock in measure(reader, teacher, root, options.steps).items():
            print(f"{way:8s} {clock.line()}")


if __name__ == "__main__":
    main()
