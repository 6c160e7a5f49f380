"""One training micro-step, whole: time and peak memory of five ways, on one thread.

    python -m benchmarks.training.step [--vocab 32064] [--large] [--frozen] [--json PATH]

A step begins at a student's final states of one sample (N vision tokens, 96 text tokens, 64 of them
response) and ends with gradients of states and LM head: matching, supervised loss, RLD, VSD, VLAD.

    emkd         `distillation_loss` on topk+sketch records: raw L1 at shared ids, blend
    emkd hidden  the same on hidden records: exact losses
    dense        `torch.cdist(p=1)` over all of V, 64 teacher rows at a time; log-softmax of both
                 sides' logits and autograd. The teacher's logits are there and cost it nothing
    broadcast    the same, but abs(s[:, None] - t[None]) at once: where half of the memory is enough
    others'      every fourth teacher token alone, squared errors in place of KL; dense as well

Only `dense` and `broadcast` compute what `emkd hidden` computes but for its shared ids. Processor
time of all threads, after a small one; memory is what a pass adds at its peak, as in
losses.py. Models and images are made up (synthetic/vision_states.py, width 512). Needs
Linux; --large takes 16 GiB and many times as long.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.synthetic.memory import in_child, keep_freed_memory, peak_mib, return_freed_memory
from benchmarks.synthetic.vision_states import WIDTH, Models, field
from student_train.config.objective import ObjectiveConfig
from student_train.data.sample_states import SampleStates
from student_train.head.linear_head import LinearHead
from student_train.losses.objective_loss import distillation_loss
from student_train.matching.assignment import solve_assignment
from teacher_cache.records.affinity import cosine_affinity
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.sketch import encode_sketch
from teacher_cache.records.top_k import top_k_from_hidden
from teacher_cache.schema.samples import ViewGrid
from teacher_cache.schema.teacher_output import AffinityRecord, HiddenRecord, TeacherOutput

VOCABS = (32_064, 151_936)
GRIDS = (((12, 12), (24, 24)), ((14, 14), (27, 27)))
LARGE = ((24, 24), (48, 60))
NUM_TEXT, NUM_RESPONSE, TOP_K, RANK = 96, 64, 64, 128


class Step(NamedTuple):
    """A student's states of one sample, its head, and what is known of the teacher."""

    states: SampleStates
    head: LinearHead
    assets: TeacherAssets
    sketched: TeacherOutput
    hidden: TeacherOutput
    vision_logits: Tensor
    response_logits: Tensor


def make_step(
    models: Models, student_grid: tuple[int, int], teacher_grid: tuple[int, int], trained: bool
) -> Step:
    """The same numbers in every process."""
    generator = torch.Generator().manual_seed(11)
    head, vocab_size = models.teacher_head, models.teacher_head.vocab_size
    vision = field(models.axes, *teacher_grid, seed=1)
    text = torch.randn(NUM_TEXT, WIDTH, generator=generator) @ models.axes.T * WIDTH**0.5 / 8
    pooled = functional.adaptive_avg_pool2d(vision.T.reshape(1, WIDTH, *teacher_grid), student_grid)
    own = pooled[0].flatten(1).T + 0.3 * field(models.axes, *student_grid, seed=2, noise=1.0)
    predicting = text[-NUM_RESPONSE:]
    ids = torch.randint(vocab_size, (NUM_TEXT,), generator=generator)
    is_response = torch.arange(NUM_TEXT) >= NUM_TEXT - NUM_RESPONSE
    states = SampleStates(
        views=(_view(student_grid),),
        vision=own.contiguous().requires_grad_(),
        text=(text + 0.1).requires_grad_(),
        predicting=(predicting + 0.1).requires_grad_(),
        text_is_response=is_response,
        response_ids=ids[is_response],
        content_ids=ids,
    )
    record = top_k_from_hidden(vision, head, TOP_K)

    def output(**records: object) -> TeacherOutput:
        return TeacherOutput(
            views=(_view(teacher_grid),),
            content_ids=ids,
            is_response=is_response,
            after_image=torch.ones_like(is_response),
            **records,  # pyright: ignore[reportArgumentType]
        )

    return Step(
        states=states,
        head=LinearHead(
            weight=models.student_head.weight.clone().requires_grad_(trained),
            bias=models.student_head.bias,
        ),
        assets=TeacherAssets(head=head, sketch=models.basis),
        sketched=output(
            vision=record,
            sketch=encode_sketch(models.basis, vision, record),
            affinity=AffinityRecord(cosine=cosine_affinity(text, vision)),
            response=top_k_from_hidden(predicting, head, TOP_K),
        ),
        hidden=output(hidden=HiddenRecord(vision=vision, text=text, predicting=predicting)),
        vision_logits=head.logits(vision),
        response_logits=head.logits(predicting),
    )


def ours(step: Step, output: TeacherOutput) -> Tensor:
    """The project's own."""
    found = distillation_loss([step.states], [output], step.head, ObjectiveConfig(), step.assets)
    found.total.backward()
    return found.total.detach()


def dense(step: Step, cost: Callable[[Tensor, Tensor], Tensor], others: bool = False) -> Tensor:
    """EM-KD over whole logits by autograd; `others`: thinned tokens and squared errors."""
    states, objective = step.states, ObjectiveConfig()
    teacher = step.vision_logits[:: 4 if others else 1]
    logits, response = step.head(states.vision), step.head(states.predicting)
    rows, columns = solve_assignment(cost(logits.detach(), teacher))
    compare = _squared if others else _reverse_kl
    vsd = compare(logits[rows], teacher[columns])
    rld = compare(response, step.response_logits)
    supervised = functional.cross_entropy(response, states.response_ids)
    affinity = step.sketched.affinity
    assert affinity is not None
    theirs = affinity.cosine[:, :: 4 if others else 1][:, columns]
    own = cosine_affinity(states.text, states.vision[rows])
    vlad = functional.smooth_l1_loss(own, theirs)
    weights = [
        getattr(objective, f"{name}_weight") for name in ("supervised", "rld", "vsd", "vlad")
    ]
    total = sum(w * term for w, term in zip(weights, (supervised, rld, vsd, vlad), strict=True))
    assert isinstance(total, Tensor)
    total.backward()
    return total.detach()


def cdist(student: Tensor, teacher: Tensor) -> Tensor:
    """Exact L1, 64 teacher rows at a time."""
    return torch.cat([torch.cdist(student, part, p=1) for part in teacher.split(64)], dim=1)


def broadcast(student: Tensor, teacher: Tensor) -> Tensor:
    """Exact L1, all differences at once."""
    return (student[:, None] - teacher[None]).abs_().sum(dim=-1)


def _reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
    return (log_q.exp() * (log_q - log_p)).sum(dim=1).mean()


def _squared(student: Tensor, teacher: Tensor) -> Tensor:
    return functional.mse_loss(student, teacher)


WAYS: dict[str, Callable[[Step], Tensor]] = {
    "emkd": lambda step: ours(step, step.sketched),
    "emkd hidden": lambda step: ours(step, step.hidden),
    "dense": lambda step: dense(step, cdist),
    "broadcast": lambda step: dense(step, broadcast),
    "others'": lambda step: dense(step, cdist, others=True),
}


def _view(grid: tuple[int, int]) -> ViewGrid:
    return ViewGrid(image=0, view=0, rows=grid[0], cols=grid[1])


def available_gib() -> float:
    """Memory that the system could give now."""
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in x)
    return int(line.split()[1]) / 2**20


def measure(step: Step, small: Step) -> dict[str, tuple[float, float]]:
    """Seconds and MiB of every way that fits."""
    num_students, num_teachers = len(step.states.vision), len(step.vision_logits)
    found: dict[str, tuple[float, float]] = {}
    for name, way in WAYS.items():
        needed = num_students * num_teachers * step.vision_logits.shape[1] * 4 / 2**30
        if name == "broadcast" and needed > available_gib() / 2:
            print(f"  {name:12} needs {needed:.1f} GiB for its differences alone", flush=True)
            continue
        memory = peak_mib(partial(way, step), partial(way, small))
        seconds, loss = in_child(partial(_timed, way, step, small))
        found[name] = seconds, memory
        first = found["emkd"]
        print(
            f"  {name:12} {seconds:8.2f} s {seconds / first[0]:7.2f} {memory:8.0f} MiB "
            f"{memory / first[1]:6.2f}   loss {loss:.4f}",
            flush=True,
        )
    return found


def _timed(way: Callable[[Step], Tensor], step: Step, small: Step) -> tuple[float, float]:
    keep_freed_memory()
    way(small)
    start = time.process_time()
    loss = way(step)
    return time.process_time() - start, float(loss)


def main() -> None:
    """Print the tables; with --json also write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABS)
    parser.add_argument("--large", action="store_true", help="196 x 729 at every V, and 576 x 2880")
    parser.add_argument("--frozen", action="store_true", help="do not train the LM head")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    return_freed_memory()
    tiny = make_step(Models.make(4_000, RANK), (3, 3), (6, 6), not options.frozen)
    report: list[dict[str, object]] = []
    for vocab_size in options.vocab:
        models = Models.make(vocab_size, RANK)
        few = GRIDS if vocab_size < 100_000 else GRIDS[:1]
        for grids in (*GRIDS, LARGE) if options.large else few:
            step = make_step(models, *grids, not options.frozen)
            shape = len(step.states.vision), len(step.vision_logits)
            head = "frozen" if options.frozen else "trained"
            print(f"\nV = {vocab_size}, N x M = {shape[0]} x {shape[1]}, head {head}")
            print(f"  {'':12} {'time':>10} {'/ emkd':>7} {'adds':>12} {'/ emkd':>6}")
            lines = measure(step, tiny)
            report.append({"vocab_size": vocab_size, "shape": shape, "ways": lines})
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
