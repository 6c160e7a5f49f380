"""Measures what EPIC's consistency term adds to a training step: time and peak memory of four ways.

    A supervised      the student's pass with tokens dropped at K = 2 (DART), forward and backward
    B TCD             the same, and the teacher's pass: layers from K on again, no gradient
    C TCD, two passes the same loss, the teacher as a second whole pass
    D uncompressed    supervised, every token through every layer

A, B and C drop the same tokens of the student: those of `paper_notes` at 10, 50 and 90 % of
the training. The script stops if B and C differ in loss or gradients. The model is a LLaVA with
random weights, one picture of 576 vision tokens and a short conversation. One thread, its processor
time, ways alternating. A cell is the median over rounds, a ratio the median of the rounds' ratios.
Memory is what a step adds to the resident set, in a child process. Linux.

    python -m benchmarks.training.epic_step [--quick] [--json PATH]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.synthetic.memory import status_mib
from benchmarks.training.compression import NUM_VISION, make_batch, make_model
from student_train.compression.compression import compress
from student_train.config.objective import ObjectiveName, preset
from student_train.config.progression import ProgressionConfig
from student_train.epic.step_passes import StudentPass, student_pass
from student_train.epic.step_plan import StepPlan, num_layers_of, plan_step
from student_train.losses.objective_loss import distillation_loss
from student_train.models.forward import final_hidden, output_head
from teacher_cache.schema.teacher_output import TeacherOutput

NUM_ANSWER = 64
SIZES = {"full": (384, 16, 3), "quick": (128, 6, 2)}
"""Width and layers of the model, and rounds."""
NUM_STEPS, STEPS = 1000, (100, 500, 900)
WAYS = ("A supervised", "B TCD", "C TCD, two passes", "D uncompressed")


class Bench:
    """A model, a batch, and one training step of each way (without the optimizer's)."""

    def __init__(self, width: int, num_layers: int, checkpointing: bool) -> None:
        self.model: Any = make_model(width, num_layers)
        self.model.model.vision_tower.requires_grad_(False)
        if checkpointing:
            self.model.train()
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.batch = make_batch(NUM_ANSWER, num_control=0)
        spans = self.batch.samples[0].spans
        self.output = TeacherOutput(
            views=spans.views,
            content_ids=spans.content_ids,
            is_response=spans.is_response,
            after_image=spans.after_image,
        )

    def plan(self, step: int) -> StepPlan:
        """The plan of that step, with a draw in the middle of its range."""
        config = ProgressionConfig()
        layers = num_layers_of(self.model)
        near = range(step, step + 40)
        plans = [
            plan_step(config, seed=0, step=s, num_steps=NUM_STEPS, num_layers=layers) for s in near
        ]
        ratios = sorted(plan.difficulty.student_ratio for plan in plans)
        middle = ratios[len(ratios) // 2]
        return next(plan for plan in plans if plan.difficulty.student_ratio == middle)

    def step(self, way: str, plan: StepPlan) -> Tensor:
        """Loss of one step, after its backward pass."""
        name: ObjectiveName = "epic-tcd" if "TCD" in way else "supervised"
        objective = preset(name)
        if way == "C TCD, two passes":
            found = self._two_passes(plan)
        else:
            used = None if way == "D uncompressed" else plan
            found = student_pass(self.model, self.batch, used, teach=name == "epic-tcd")
        head = output_head(self.model)
        loss = distillation_loss(
            found.states,
            [self.output],
            head,
            objective,
            consistency_teacher_states=found.consistency_teacher_states,
        )
        loss.total.backward()
        return loss.total.detach()

    def _two_passes(self, plan: StepPlan) -> StudentPass:
        predicting = self.batch.samples[0].spans.predicting
        with (
            torch.no_grad(),
            compress(self.model, plan.teacher, self.batch, plan.teacher_draw) as found,
        ):
            hidden = final_hidden(self.model, self.batch.inputs)
        consistency_teacher_states = hidden[0, found.layout.columns(0, predicting)]
        own = student_pass(self.model, self.batch, plan, teach=False)
        return StudentPass(
            states=own.states,
            consistency_teacher_states=consistency_teacher_states,
            diagnostics=own.diagnostics,
        )

    def gradients(self) -> Tensor:
        """All gradients in one row; and none is left."""
        found = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        return torch.cat(found)


def require_equal(bench: Bench, plan: StepPlan) -> None:
    """Stop unless the shared pass and the two whole ones give the same loss and gradients."""
    shared = bench.step("B TCD", plan), bench.gradients()
    whole = bench.step("C TCD, two passes", plan), bench.gradients()
    for found, expected in zip(shared, whole, strict=True):
        torch.testing.assert_close(found, expected)


def measure(bench: Bench, rounds: int) -> dict[int, dict[str, list[float]]]:
    """Seconds of every way at every step of the schedule, round by round."""
    plans = {step: bench.plan(step) for step in STEPS}
    times = {step: {way: list[float]() for way in WAYS} for step in STEPS}
    for plan in plans.values():
        require_equal(bench, plan)  # and warms up
    for _ in range(rounds):
        for step, plan in plans.items():
            for way in WAYS:
                start = time.thread_time()
                bench.step(way, plan)
                times[step][way].append(time.thread_time() - start)
                bench.gradients()
    return times


def child_memory(size: str, checkpointing: bool, way: str) -> float:
    """MiB that a step in the middle of the training adds, in a process of its own."""
    request = json.dumps([size, checkpointing, way])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training.epic_step", "--child", request],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout)


def measure_memory(size: str, checkpointing: bool, way: str) -> float:
    """The same, in this process."""
    width, num_layers, _ = SIZES[size]
    bench = Bench(width, num_layers, checkpointing)
    plan = bench.plan(STEPS[1])
    bench.step("D uncompressed", plan)  # gradients exist: they are the same for every way
    for parameter in bench.model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("VmRSS")
    bench.step(way, plan)
    return status_mib("VmHWM") - before


def ratio(own: Sequence[float], base: Sequence[float]) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(own, base, strict=True))


def report(size: str, checkpointing: bool, say: Callable[[str], None]) -> list[dict[str, object]]:
    """Measure and print one table."""
    width, num_layers, rounds = SIZES[size]
    bench = Bench(width, num_layers, checkpointing)
    times = measure(bench, rounds)
    memory = {way: child_memory(size, checkpointing, way) for way in WAYS}
    say(f"\n{num_layers} layers of width {width}, gradient checkpointing {checkpointing}")
    say(f"{'progress':>8s} {'vision tokens':>14s} {'way':18s} {'s':>7s} {'/ A':>6s} {'MiB':>7s}")
    rows: list[dict[str, object]] = []
    for step, found in times.items():
        difficulty = bench.plan(step).difficulty
        shares = (1 - difficulty.student_ratio, 1 - difficulty.teacher_ratio)
        tokens = " / ".join(f"{NUM_VISION * share:.0f}" for share in shares)
        for way in WAYS:
            row: dict[str, object] = {
                "progress": step / NUM_STEPS,
                "tokens": tokens,
                "way": way,
                "seconds": statistics.median(found[way]),
                "over_supervised": ratio(found[way], found[WAYS[0]]),
                "mib": memory[way] if step == STEPS[1] else None,
                "checkpointing": checkpointing,
            }
            rows.append(row)
            room = f"{memory[way]:7.0f}" if step == STEPS[1] else " " * 7
            say(
                f"{step / NUM_STEPS:8.1f} {tokens:>14s} {way:18s} "
                f"{statistics.median(found[way]):7.2f} {ratio(found[way], found[WAYS[0]]):6.2f} "
                f"{room}"
            )
    total = {
        way: [sum(t) for t in zip(*(times[s][way] for s in STEPS), strict=True)] for way in WAYS
    }
    over = {way: ratio(total[way], total[WAYS[0]]) for way in WAYS}
    say("over the three: " + ", ".join(f"{way} {over[way]:.2f}" for way in WAYS))
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child is not None:
        print(measure_memory(*json.loads(options.child)))
        return
    size = "quick" if options.quick else "full"
    print("vision tokens: those that the student / the teacher keeps from layer 2 on, of 576")
    rows = [row for checkpointing in (False, True) for row in report(size, checkpointing, print)]
    if options.json is not None:
        options.json.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
