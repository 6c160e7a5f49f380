"""Head and losses: time and peak memory of four ways from states to gradients, on one thread.

    python -m benchmarks.losses [--vocab 32064] [--json PATH]

A is autograd over all logits at once, B `torch.utils.checkpoint` on chunks of 64 rows, C the way
of public fused kernels in plain torch (as many chunks as the vocabulary is wider than the states,
gradients of states and weight from autograd chunk by chunk, then added up), D `head_loss`. All
compute supervised and reverse KL of the same rows, from the top 64 of a made-up teacher with the
rest in one bucket, or from its states. They agree before they are measured.

Memory is what a pass adds to the resident set at its peak (VmHWM after a reset), in a child of its
own in which glibc returns every block that is freed (MALLOC_MMAP_THRESHOLD_): that is what lives
at once, as on a GPU, gradients included. Left alone, glibc keeps some 100 MiB of freed blocks.
Time is processor time, best of some rounds in turns. Needs Linux, and 8 GiB for the largest cell.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from student_train.fused_head import HeadRows, even_slices, head_loss
from student_train.linear_head import LinearHead
from student_train.logit_terms import divergence_term, head_rows, supervised_term
from student_train.objective import ObjectiveConfig
from student_train.signals import HiddenSignal, Signal
from student_train.terms import token_mean
from student_train.top_k_signal import TopKSignal
from teacher_cache.head import LmHead

WIDTH, NUM_KEPT = 896, 64
VOCABS, ROWS = (32_064, 151_936), (144, 1_152)
KINDS = (("top-64", False), ("hidden", False), ("top-64", True))
"""Teacher, and whether the student's head is trained."""


class Cell(NamedTuple):
    """One line of the table."""

    vocab_size: int
    num_rows: int
    teacher: str
    trained: bool


class Problem(NamedTuple):
    """States and head of a student, and what is asked of them."""

    hidden: Tensor
    head: LinearHead
    rows: HeadRows

    def loss(self, logits: Tensor, chunk: slice) -> Tensor:
        """The weighted total over some rows, all at once."""
        values = self.rows.losses(chunk)(logits, slice(None))
        parts = [(values[name] * w[chunk]).sum() for name, w in self.rows.weights.items()]
        return torch.stack(parts).sum()


def make_problem(cell: Cell) -> Problem:
    """The same numbers in every process."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    num_rows, vocab_size = cell.num_rows, cell.vocab_size
    weight = normal(vocab_size, WIDTH).mul_(4 / WIDTH**0.5).requires_grad_(cell.trained)
    hidden = normal(num_rows, WIDTH).requires_grad_()
    teacher: Signal
    if cell.teacher == "hidden":
        near = hidden.detach() + 0.5 * normal(num_rows, WIDTH)
        teacher = HiddenSignal(hidden=near, head=LmHead(weight=weight.detach()))
    else:
        stride = vocab_size // NUM_KEPT  # 64 distinct ids a row, anywhere
        first = torch.randint(stride, (num_rows, NUM_KEPT), generator=generator)
        ids = (first + stride * torch.arange(NUM_KEPT)).to(torch.int32)
        logits = normal(num_rows, NUM_KEPT).mul_(3).sort(dim=1, descending=True).values
        tail = torch.full((num_rows,), 0.1)
        logsumexp = logits.logsumexp(dim=1) - torch.log1p(-tail)
        teacher = TopKSignal(
            ids=ids, logits=logits, logsumexp=logsumexp, log_tail=tail.log(), vocab_size=vocab_size
        )
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    terms = [
        supervised_term(0.5, labels, token_mean),
        divergence_term("rld", 0.5, teacher, ObjectiveConfig(), token_mean),
    ]
    return Problem(hidden, LinearHead(weight=weight), head_rows(hidden, terms))


def naive(problem: Problem) -> Tensor:
    """A: every logit, and autograd."""
    loss = problem.loss(problem.head(problem.hidden), slice(None))
    loss.backward()
    return loss


def checkpointed(problem: Problem) -> Tensor:
    """B: chunks whose logits are computed twice."""

    def part(hidden: Tensor, chunk: slice) -> Tensor:
        return problem.loss(problem.head(hidden), chunk)

    loss = torch.zeros(())
    for chunk in even_slices(len(problem.hidden), 64):
        loss = loss + checkpoint(part, problem.hidden[chunk], chunk, use_reentrant=False)
    loss.backward()
    return loss


def chunked(problem: Problem) -> Tensor:
    """C: gradients of every chunk from autograd, added up in the forward pass."""
    weight, hidden = problem.head.weight, problem.hidden
    loss, by_hidden = torch.zeros(()), torch.zeros_like(hidden)
    by_weight = torch.zeros_like(weight) if weight.requires_grad else None
    num_chunks = -(-len(weight) // WIDTH)
    wanted = -(-len(hidden) // num_chunks)
    for start in range(0, len(hidden), step := 1 << (wanted - 1).bit_length()):
        chunk = slice(start, start + step)
        leaf = hidden[chunk].detach().requires_grad_()
        part = problem.loss(problem.head(leaf), chunk)
        inputs = [leaf] if by_weight is None else [leaf, weight]
        found = torch.autograd.grad(part, inputs)
        by_hidden[chunk] = found[0]
        if by_weight is not None:
            by_weight += found[1]
        loss += part.detach()
    hidden.grad, weight.grad = by_hidden, by_weight
    return loss


def fused(problem: Problem) -> Tensor:
    """D: ours."""
    loss = head_loss(problem.head, [problem.rows]).total
    loss.backward()
    return loss


WAYS: dict[str, Callable[[Problem], Tensor]] = {
    "A naive": naive,
    "B checkpoint": checkpointed,
    "C chunked": chunked,
    "D head_loss": fused,
}


def status_mib(field: str) -> float:
    """A field of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def measure_memory(cell: Cell, way: str) -> float:
    """What one pass adds at its peak; in this process, so call it in a child."""
    problem = make_problem(cell)
    small = make_problem(Cell(1_000, 8, cell.teacher, cell.trained))
    WAYS[way](small)  # whatever torch sets up at first use is no part of it
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("VmRSS")
    WAYS[way](problem)
    return status_mib("VmHWM") - before


def child_memory(cell: Cell, way: str) -> float:
    """`measure_memory` in a child that gives freed memory back at once."""
    request = json.dumps([*cell, way])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.losses", "--child", request],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout)


def measure_times(cell: Cell, rounds: int) -> dict[str, float]:
    """Seconds of each way, after a check that all of them compute the same."""
    problem = make_problem(cell)
    best: dict[str, float] = {}
    losses: dict[str, float] = {}
    norms: dict[str, float] = {}
    for _ in range(rounds):
        for name, way in WAYS.items():
            problem.hidden.grad = problem.head.weight.grad = None
            start = time.process_time()
            losses[name] = way(problem).item()
            seconds = time.process_time() - start
            best[name] = min(seconds, best.get(name, seconds))
            tensors = (problem.hidden.grad, problem.head.weight.grad)
            norms[name] = sum(float(g.norm()) for g in tensors if g is not None)
    for found in (losses, norms):
        spread = max(found.values()) - min(found.values())
        assert spread <= 1e-4 * max(found.values()), f"the ways disagree: {found}"
    return best


def print_line(cell: Cell, *columns: dict[str, float]) -> None:
    """A's figure and the ratios of the others to it."""
    head = "trained" if cell.trained else "frozen"
    print(f"{cell.vocab_size:10} {cell.num_rows:4} {cell.teacher:7} {head:7}", end="")
    for values in columns:
        first, *others = values.values()
        print(f" | {first:8.2f}", *(f"{value / first:6.3f}" for value in others), end="")
    print(flush=True)


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        *cell, way = json.loads(options.child)
        print(measure_memory(Cell(*cell), way))
        return
    print(
        "vocabulary rows teacher head    | A in s, then B C D over A | A in MiB, then B C D over A"
    )
    lines: list[dict[str, object]] = []
    for cell in [Cell(v, n, *kind) for v in options.vocab for n in ROWS for kind in KINDS]:
        seconds = measure_times(cell, rounds=3 if cell.num_rows < 1000 else 1)
        memory = {way: child_memory(cell, way) for way in WAYS}
        lines.append({**cell._asdict(), "seconds": seconds, "peak_mib": memory})
        print_line(cell, seconds, memory)
    if options.json is not None:
        options.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
