"""Measures the share of a training step that matching takes, with and without solver threads.

    python -m benchmarks.matching.share_of_step [--steps 12] [--large]

By default one step is that of the demo's EM-KD student (demo_student.py). With `--large` it is the
forward and backward pass of a language model of 24 layers and width 896 with random weights,
V = 151,936, one sample of 144 student and 729 teacher tokens and 104 text tokens, no vision tower.

`starting` and `asking` are the training thread's work before the response's pass through the head
and when it asks for the matchings, diagnostics included. `costs` is the time of the thread that
computes costs, `solving` that of the assignments; both run beside that pass. `blocked` is the time
that the training thread waits for them. Inline, the same calls run one after the other, costs and
solving inside `starting`. `visible` is the share of starting and asking in the training thread's
processor time. `solving`, `blocked` and `wall` (a whole step) are wall times, valid on an idle
machine only. Medians over steps.
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
from torch import nn
from transformers import Qwen2Config, Qwen2Model

from benchmarks.synthetic.demo_student import make_miniature
from benchmarks.synthetic.vision_states import Models, Problem
from student_train.config.objective import preset
from student_train.data.sample_states import SampleStates
from student_train.losses import batch_matching, objective_loss
from student_train.losses.objective_loss import distillation_loss
from student_train.matching import matching
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.top_k import top_k_from_hidden
from teacher_cache.schema.samples import ViewGrid
from teacher_cache.schema.teacher_output import AffinityRecord, SketchRecord, TeacherOutput

WARM_UP = 1


class Inline(Executor):
    """Runs each call at once, in the calling thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return a finished future."""
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


@dataclass(kw_only=True)
class Clock:
    """Seconds of each step, by activity."""

    starting: list[float] = field(default_factory=list[float])
    costs: list[float] = field(default_factory=list[float])
    solving: list[float] = field(default_factory=list[float])
    asking: list[float] = field(default_factory=list[float])
    blocked: list[float] = field(default_factory=list[float])
    steps: list[float] = field(default_factory=list[float])
    wall: list[float] = field(default_factory=list[float])

    def watch(self, work: Callable[..., Any], busy: str | None, wall: str | None) -> Any:
        """Wrap `work`: add its processor time and its other time to the current step."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            start, begin = time.perf_counter(), time.thread_time() if busy else 0.0
            found = work(*args, **kwargs)
            used = time.thread_time() - begin if busy else 0.0
            if busy:
                getattr(self, busy)[-1] += used
            if wall:
                getattr(self, wall)[-1] += max(0.0, time.perf_counter() - start - used)
            return found

        return watched

    def line(self) -> str:
        """Format medians in ms, and the visible share."""
        starting, costs, solving, asking, blocked, steps, wall = (
            1e3 * statistics.median(each[WARM_UP:]) for each in vars(self).values()
        )
        return (
            f"step {steps:8.1f} ms   starting {starting:6.2f}   asking {asking:6.2f}   visible "
            f"{(starting + asking) / steps:6.2%}   costs {costs:6.2f}   solving {solving:6.2f}   "
            f"blocked {blocked:6.2f}   wall {wall:8.1f}"
        )


def measure(step: Callable[[], None], num_steps: int) -> dict[str, Clock]:
    """Measure steps in threads and inline, alternating."""
    solve, result = matching.solve_assignment, batch_matching.PendingBatch.result
    start, solvers = batch_matching.start_batch_matching, matching._solvers  # pyright: ignore[reportPrivateUsage]
    compute, cost_thread = batch_matching.start_matching, batch_matching._cost_thread  # pyright: ignore[reportPrivateUsage]
    clocks = {"threads": Clock(), "inline": Clock()}
    for _ in range(num_steps + WARM_UP):
        for way, clock in clocks.items():
            for each in vars(clock).values():
                each.append(0.0)
            matching.solve_assignment = clock.watch(solve, None, "solving")
            objective_loss.start_batch_matching = clock.watch(start, "starting", None)
            batch_matching.start_matching = clock.watch(compute, "costs", None)
            batch_matching.PendingBatch.result = clock.watch(result, "asking", "blocked")
            matching._solvers = Inline if way == "inline" else solvers  # pyright: ignore
            batch_matching._cost_thread = Inline if way == "inline" else cost_thread  # pyright: ignore
            start_s, begin = time.perf_counter(), time.thread_time()
            step()
            clock.steps[-1] = time.thread_time() - begin
            clock.wall[-1] = time.perf_counter() - start_s
    return clocks


def demo_step(root: Path) -> Callable[[], None]:
    """Return an optimizer step of the demo's EM-KD student, on one batch."""
    miniature = make_miniature(root, 256)
    batch = next(iter(miniature.stream))
    return lambda: miniature.step(batch)


def large_step() -> Callable[[], None]:
    """Return the forward and backward pass of a large student on one sample; no optimizer."""
    models = Models.make(151_936, 128)
    problem = Problem.make(models, (12, 12), (27, 27), (64,), (128,))
    teacher, num_text, num_response = problem.sketches[128], 104, 64
    assert teacher.sketch is not None
    is_response = torch.arange(num_text) >= num_text - num_response
    content_ids = torch.randint(0, 151_936, (num_text,))
    grid = {"image": 0, "view": 0}
    output = TeacherOutput(
        views=(ViewGrid(**grid, rows=27, cols=27),),
        content_ids=content_ids,
        is_response=is_response,
        after_image=torch.ones(num_text, dtype=torch.bool),
        vision=top_k_from_hidden(problem.hidden.hidden, models.teacher_head, 64),
        sketch=SketchRecord(
            codes=teacher.sketch.codes,
            scale=teacher.sketch.scale,
            tail_shift=teacher.sketch.tail_shift,
        ),
        affinity=AffinityRecord(cosine=torch.rand(num_text, 729)),
        response=top_k_from_hidden(problem.hidden.hidden[:num_response], models.teacher_head, 64),
    )
    size = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
    model = Qwen2Model(Qwen2Config(vocab_size=8, **size, **heads))
    head = nn.Linear(896, 151_936, bias=False)
    inputs = torch.randn(1, 144 + num_text, 896)
    assets = TeacherAssets(sketch=models.basis)

    def step() -> None:
        hidden = model(inputs_embeds=inputs, use_cache=False).last_hidden_state[0]
        state = SampleStates(
            views=(ViewGrid(**grid, rows=12, cols=12),),
            vision=hidden[:144],
            text=hidden[144:],
            predicting=hidden[-num_response - 1 : -1],
            text_is_response=is_response,
            response_ids=content_ids[is_response],
            content_ids=content_ids,
        )
        distillation_loss([state], [output], head, preset("emkd"), assets).total.backward()
        model.zero_grad()
        head.zero_grad()

    return step


def main() -> None:
    """Print both lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        step = large_step() if options.large else demo_step(Path(place))
    for way, clock in measure(step, options.steps).items():
        print(f"{way:8s} {clock.line()}")


if __name__ == "__main__":
    main()
