"""What a CUDA device takes for distances, head with losses and a whole step, beside its limits.

    python -m benchmarks.gpu.gpu [--vocab 32064] [--json PATH]     needs CUDA
    python -m benchmarks.gpu.gpu --counts [--vocab 151936]    needs none: counts bytes moved

The limits are the device's own in the same run: bytes a second of a large copy, operations a second
of a bfloat16 product, and half those of a float32 product without TF32 for additions, which count
once where a multiply-add counts twice. `floor` is the longer of the two times that a problem cannot
do without: each input read and each output written once, and its operations. Ways with kernels and
without (EMKD_KERNELS) run in one process, in turns; time is the median of CUDA events after a
warm-up, memory what a call adds at its peak. `--device cpu --tiny` runs the same code in seconds,
for tests: its times mean nothing. No figure of a GPU stands anywhere yet: docs/gpu.md.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.bytes_moved import l1_additions, l1_least_bytes
from benchmarks.gpu.loss_bytes import L1_SHAPES, HeadProblem, make_head_problem, print_counts
from benchmarks.synthetic.vision_states import Models
from benchmarks.training.step import Step, cdist, dense, make_step, ours
from student_train.head.fused_loss import head_loss
from student_train.head.linear_head import LinearHead
from student_train.ops.l1 import l1_distances
from student_train.ops.use_kernels import SWITCH

NO_CUDA = 2
"""Exit code where there is nothing to measure."""
SHARED_IDS = 8192
WIDTH, HEAD_ROWS = 3584, 1152


class Limits(NamedTuple):
    """What a device can do in a second, measured."""

    name: str
    copied_bytes: float
    half_flops: float
    additions: float


class Line(NamedTuple):
    """One way of doing one thing."""

    what: str
    way: str
    milliseconds: float
    floor_milliseconds: float
    peak_mib: float


class Bench(NamedTuple):
    """Where and how long to measure."""

    device: torch.device
    tiny: bool

    @property
    def num_rounds(self) -> int:
        """Timed calls; the median counts."""
        return 1 if self.tiny else 11

    def milliseconds(self, work: Callable[[], object]) -> float:
        """Median time of a call."""
        work()
        return statistics.median(self._timed(work) for _ in range(self.num_rounds))

    def _timed(self, work: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return 1000 * (time.perf_counter() - start)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def peak_mib(self, work: Callable[[], object]) -> float:
        """What a call adds to the memory that tensors take; nan where nobody counts."""
        if self.device.type != "cuda":
            return float("nan")
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def line(self, what: str, way: str, work: Callable[[], object], floor_s: float) -> Line:
        """Measure one way."""
        return Line(what, way, self.milliseconds(work), 1000 * floor_s, self.peak_mib(work))


@contextmanager
def kernels(switch: bool) -> Generator[None]:
    """With kernels of our own where they can run, or without."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1" if switch else "0"
    try:
        yield
    finally:
        os.environ.pop(SWITCH) if before is None else os.environ.update({SWITCH: before})


def measure_limits(bench: Bench) -> Limits:
    """Bytes of a copy, and operations of two products."""
    size = 256 if bench.tiny else 8192
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else bench.device.type
    source = torch.zeros(size * size, device=bench.device)
    copied = torch.empty_like(source)
    seconds = bench.milliseconds(lambda: copied.copy_(source)) / 1000
    flops: list[float] = []
    for dtype in (torch.bfloat16, torch.float32):
        left = torch.randn(size, size, device=bench.device, dtype=dtype)
        precise = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        flops.append(2 * size**3 / (bench.milliseconds(lambda x=left: x @ x) / 1000))
        torch.backends.cuda.matmul.allow_tf32 = precise
    return Limits(name, 2 * source.nbytes / seconds, flops[0], flops[1] / 2)


def l1_lines(bench: Bench, limits: Limits, vocab_size: int) -> Iterator[Line]:
    """`torch.cdist`, strips, and the kernel where it runs."""
    shapes = ((3, 5),) if bench.tiny else L1_SHAPES
    for num_left, num_right in shapes:
        for num_columns in (SHARED_IDS, vocab_size):
            left = torch.randn(num_left, num_columns, device=bench.device)
            right = torch.randn(num_right, num_columns, device=bench.device)
            sizes = num_left, num_right, num_columns
            floor_s = max(
                l1_least_bytes(*sizes) / limits.copied_bytes,
                l1_additions(*sizes) / limits.additions,
            )
            what = f"L1 {num_left} x {num_right}, {num_columns} columns"
            ways: dict[str, Callable[[], Tensor]] = {
                "torch.cdist": lambda a=left, b=right: torch.cdist(a, b, p=1),
                "strips": lambda a=left, b=right: _without_kernels(l1_distances, a, b),
                "kernel": lambda a=left, b=right: l1_distances(a, b),
            }
            for way, work in ways.items():
                yield bench.line(what, way, work, floor_s)


def _without_kernels(work: Callable[..., Tensor], *args: Tensor) -> Tensor:
    with kernels(False):
        return work(*args)


def head_lines(bench: Bench, limits: Limits, vocab_size: int) -> Iterator[Line]:
    """`head_loss` there and back over rows of a response, by autograd over all logits and fused."""
    num_rows, width = (6, 8) if bench.tiny else (HEAD_ROWS, WIDTH)
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    problem = make_head_problem(num_rows, vocab_size, width, bench.device, dtype)
    operations = 3 * 2 * num_rows * vocab_size * width / limits.half_flops
    # The weight twice, its gradient once; the states and theirs.
    tensors = 3 * problem.head.weight.nbytes + 2 * problem.hidden.nbytes
    floor_s = max(operations, tensors / limits.copied_bytes)
    what = f"head and losses, {num_rows} rows, V = {vocab_size}, D = {width}"
    yield bench.line(what, "autograd over all logits", lambda: _naive(problem), floor_s)
    for way, switch in (("fused, torch's losses", False), ("fused", True)):
        with kernels(switch):
            yield bench.line(what, way, lambda: _fused(problem), floor_s)


def _naive(problem: HeadProblem) -> None:
    problem.forget()
    logits = problem.head(problem.hidden).float()
    found = problem.rows.losses.values(logits, slice(None))
    parts = [(found[name] * weight).sum() for name, weight in problem.rows.weights.items()]
    torch.stack(parts).sum().backward()


def _fused(problem: HeadProblem) -> None:
    problem.forget()
    head_loss(problem.head, [problem.rows]).total.backward()


def step_lines(bench: Bench, limits: Limits, vocab_size: int) -> Iterator[Line]:
    """A micro-step of one sample, from its final states: no floor is known for the whole."""
    grids = ((2, 2), (4, 4)) if bench.tiny else ((12, 12), (24, 24))
    models = Models.make(vocab_size, 4 if bench.tiny else 128)
    step = _moved_step(make_step(models, *grids, trained=True), bench.device)
    what = f"micro-step, {len(step.states.vision)} x {len(step.vision_logits)}, V = {vocab_size}"
    ways: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: dense(step, lambda a, b: cdist(a, b).cpu()),
        "emkd, without kernels": lambda: _without_kernels(lambda: ours(step, step.sketched)),
        "emkd": lambda: ours(step, step.sketched),
    }
    for way, work in ways.items():
        yield bench.line(what, way, work, float("nan"))


def _moved_step(step: Step, device: torch.device) -> Step:
    states = step.states

    def leaf(values: Tensor) -> Tensor:
        return values.detach().to(device).requires_grad_(values.requires_grad)

    bias = step.head.bias
    return step._replace(
        states=replace(
            states,
            vision=leaf(states.vision),
            text=leaf(states.text),
            predicting=leaf(states.predicting),
            text_is_response=states.text_is_response.to(device),
            response_ids=states.response_ids.to(device),
        ),
        head=LinearHead(weight=leaf(step.head.weight), bias=None if bias is None else leaf(bias)),
        assets=step.assets.to(device),
        vision_logits=step.vision_logits.to(device),
        response_logits=step.response_logits.to(device),
    )


def print_lines(limits: Limits, lines: Iterator[Line]) -> list[Line]:
    """Print as they come."""
    print(
        f"{limits.name}: {limits.copied_bytes / 1e12:.2f} TB/s copied, "
        f"{limits.half_flops / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{limits.additions / 1e12:.1f} T float32 additions/s\n\n"
        f"{'':50} {'ms':>9} {'floor':>9} {'ratio':>7} {'adds MiB':>9}"
    )
    printed: list[Line] = []
    for line in lines:
        if not printed or printed[-1].what != line.what:
            print(line.what)
        ratio = line.milliseconds / line.floor_milliseconds
        print(
            f"    {line.way:46} {line.milliseconds:9.3f} "
            f"{line.floor_milliseconds:9.3f} {ratio:7.2f} {line.peak_mib:9.1f}",
            flush=True,
        )
        printed.append(line)
    return printed


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; with --json also write the lines. Exit code 2 without CUDA."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--counts", action="store_true", help="bytes moved, without a GPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of tests")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.counts:
        print_counts(options.vocab)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.gpu.gpu needs a CUDA device; torch finds none here. Run it on a machine "
            "with one, or take --counts for what can be known without",
            file=sys.stderr,
        )
        return NO_CUDA
    bench = Bench(torch.device(options.device), options.tiny)
    limits = measure_limits(bench)

    def lines() -> Iterator[Line]:
        for part in (l1_lines, head_lines, step_lines):
            yield from part(bench, limits, options.vocab)

    printed = print_lines(limits, lines())
    if options.json is not None:
        report = {"limits": limits._asdict(), "lines": [line._asdict() for line in printed]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
