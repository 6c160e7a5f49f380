"""Measures head and losses: time and peak memory of six ways to gradients, on one thread.

    python -m benchmarks.training.losses [--vocab 32064] [--rows 1152 --teacher top-64] [--large]

A is autograd over all logits at once: the page of equations (losses/reference.py) where the teacher
knows every logit, else our own losses. B is `torch.utils.checkpoint` on chunks of 64 rows. C does
what public fused kernels do, in plain torch: as many chunks as the vocabulary is wider than the
states, gradients of states and weight from autograd chunk by chunk, then summed. D is `head_loss`.
All compute supervised loss and divergence of the same rows, from the top K of a made-up teacher
with the rest in one bucket, from its logits or from its states; the script checks that they agree.
E and F are what others use instead, by autograd over all logits: forward KL of the kept entries,
renormalised, and the squared error of logits.

A head is frozen, trained, or trained in a `later` micro-batch of a step: its weight already holds a
gradient, to which each way adds. Without --large only some cells run (or those of --rows and
--teacher), B and C only where they are quick: about 4 minutes. Memory is what a pass adds to the
resident set at its peak (VmHWM after a reset), gradients included, in a forked child in which glibc
returns every freed block (M_MMAP_THRESHOLD), so that it is what lives at once, as on a GPU. Time is
processor time, best of some rounds in turns. Needs Linux; 8 GiB for --large.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from benchmarks.synthetic.memory import in_child, keep_freed_memory, peak_mib, return_freed_memory
from student_train.config.objective import DivergenceName, ObjectiveConfig
from student_train.head.chunked_pass import HeadRows, even_slices
from student_train.head.fused_loss import head_loss
from student_train.head.linear_head import LinearHead
from student_train.losses import reference
from student_train.losses.logit_terms import SupervisedTerm, divergence_term, head_rows
from student_train.losses.reductions import supervised_rows
from student_train.signals.teacher_signal import DenseSignal, HiddenSignal, Signal
from student_train.signals.top_k import TopKSignal
from teacher_cache.records.lm_head import LmHead
from teacher_cache.schema.teacher_output import TopKRecord

WIDTH = 896
VOCABS, ROWS = (32_064, 151_936), (144, 576, 1_152)
TEACHERS = ("top-16", "top-64", "top-256", "dense", "hidden")
HEADS = ("frozen", "trained", "later")


class Cell(NamedTuple):
    """One line of the table."""

    vocab_size: int
    num_rows: int
    teacher: str
    head: str
    """One of HEADS."""


class Problem(NamedTuple):
    """States and head of a student, and the losses to compute."""

    hidden: Tensor
    head: LinearHead
    rows: HeadRows
    labels: Tensor
    teacher: Signal
    is_paper: bool
    """Whether the page of equations defines the losses: reverse KL, every teacher logit known."""

    def loss(self, logits: Tensor, chunk: slice) -> Tensor:
        """The weighted total over some rows, all at once."""
        values = self.rows.losses.chunk(chunk).values(logits, slice(None))
        parts = [(values[name] * w[chunk]).sum() for name, w in self.rows.weights.items()]
        return torch.stack(parts).sum()


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """The requested lines, or those that take about 4 minutes together."""
    chosen = options.large or options.rows or options.teacher
    for vocab_size in options.vocab:
        for num_rows in options.rows or ROWS:
            for teacher in options.teacher or TEACHERS:
                for head in HEADS:
                    cell = Cell(vocab_size, num_rows, teacher, head)
                    if chosen or _is_quick(cell):
                        yield cell


def _is_quick(cell: Cell) -> bool:
    if cell.vocab_size < 100_000 and cell.num_rows == 144:
        return cell.head == "frozen" or cell.teacher == "top-64"
    most_rows = 144 if cell.vocab_size > 100_000 else 1_152
    return cell.teacher == "top-64" and cell.num_rows == most_rows


def make_problem(cell: Cell, divergence: DivergenceName = "reverse_kl") -> Problem:
    """The same numbers in every process."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    num_rows, vocab_size = cell.num_rows, cell.vocab_size
    weight = normal(vocab_size, WIDTH).mul_(4 / WIDTH**0.5)
    weight.requires_grad_(cell.head != "frozen")
    if cell.head == "later":
        weight.grad = torch.empty_like(weight).zero_()  # written, and so resident
    hidden = normal(num_rows, WIDTH).requires_grad_()
    teacher: Signal
    if cell.teacher.startswith("top-"):
        num_kept = int(cell.teacher.removeprefix("top-"))
        stride = vocab_size // num_kept  # distinct ids a row, anywhere
        first = torch.randint(stride, (num_rows, num_kept), generator=generator)
        ids = (first + stride * torch.arange(num_kept)).to(torch.int32)
        logits = normal(num_rows, num_kept).mul_(3).sort(dim=1, descending=True).values
        tail = torch.full((num_rows,), 0.1)
        logsumexp = logits.logsumexp(dim=1) - torch.log1p(-tail)
        record = TopKRecord(
            ids=ids, logits=logits, logsumexp=logsumexp, log_tail=tail.log(), vocab_size=vocab_size
        )
        teacher = TopKSignal(record=record)
    else:
        near = hidden.detach() + 0.5 * normal(num_rows, WIDTH)
        teacher = HiddenSignal(hidden=near, head=LmHead(weight=weight.detach()))
        if cell.teacher == "dense":
            teacher = DenseSignal(logits=teacher.dense_logits())
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    objective = ObjectiveConfig(divergence=divergence)
    terms = [
        SupervisedTerm(weight=0.5, response_ids=labels),
        divergence_term("rld", 0.5, teacher, objective),
    ]
    head, rows = LinearHead(weight=weight), head_rows(hidden, terms)
    is_paper = teacher.exact and divergence == "reverse_kl"
    return Problem(hidden, head, rows, labels, teacher, is_paper)


def naive(problem: Problem) -> Tensor:
    """A: every logit, and autograd."""
    logits = problem.head(problem.hidden)
    if problem.is_paper:
        rld = reference.rld(logits, problem.teacher.dense_logits())
        loss = 0.5 * reference.supervised(logits, problem.labels) + 0.5 * rld
    else:
        loss = problem.loss(logits, slice(None))
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
    hidden.grad = by_hidden
    if by_weight is not None:
        weight.grad = by_weight if weight.grad is None else weight.grad.add_(by_weight)
    return loss


def fused(problem: Problem) -> Tensor:
    """D: the product's."""
    loss = head_loss(problem.head, [problem.rows]).total
    loss.backward()
    return loss


def renormalised(problem: Problem) -> Tensor:
    """E: forward KL of the kept entries alone, or of all where all are known."""
    logits = problem.head(problem.hidden)
    own, theirs = _compared(problem, logits)
    log_q, log_p = own.log_softmax(dim=1), theirs.log_softmax(dim=1)
    kl = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=1)
    return _backward(problem, logits, kl)


def squared(problem: Problem) -> Tensor:
    """F: squared error of the same logits."""
    logits = problem.head(problem.hidden)
    own, theirs = _compared(problem, logits)
    return _backward(problem, logits, (own - theirs).square().mean(dim=1))


def _compared(problem: Problem, logits: Tensor) -> tuple[Tensor, Tensor]:
    teacher = problem.teacher
    if isinstance(teacher, TopKSignal):
        return logits.gather(1, teacher.record.ids.long()), teacher.record.logits
    return logits, teacher.dense_logits()


def _backward(problem: Problem, logits: Tensor, values: Tensor) -> Tensor:
    loss = 0.5 * values.mean() + 0.5 * supervised_rows(logits, problem.labels).mean()
    loss.backward()
    return loss


WAYS: dict[str, Callable[[Problem], Tensor]] = {
    "A naive": naive,
    "B checkpoint": checkpointed,
    "C chunked": chunked,
    "D head_loss": fused,
    "E renormalised": renormalised,
    "F squared": squared,
}
SLOW, OTHERS = ("B checkpoint", "C chunked"), ("E renormalised", "F squared")


def ways_of(cell: Cell, large: bool) -> list[str]:
    """The ways that are measured; the slow ones where they end soon."""
    soon = large or (cell.num_rows * cell.vocab_size < 10**7 and cell.teacher == "top-64")
    return [name for name in WAYS if soon or name not in SLOW]


def measure_times(problem: Problem, names: list[str], rounds: int) -> dict[str, float]:
    """Seconds of each way, after a check that A to D compute the same."""
    keep_freed_memory()
    best: dict[str, float] = {}
    losses: dict[str, float] = {}
    norms: dict[str, float] = {}
    waiting = problem.head.weight.grad
    for _ in range(rounds):
        for name in names:
            problem.hidden.grad = None
            problem.head.weight.grad = None if waiting is None else waiting.zero_()
            start = time.process_time()
            loss = WAYS[name](problem)
            seconds = time.process_time() - start
            best[name] = min(seconds, best.get(name, seconds))
            if name not in OTHERS:
                losses[name] = loss.item()
                tensors = (problem.hidden.grad, problem.head.weight.grad)
                norms[name] = sum(float(g.norm()) for g in tensors if g is not None)
    for found in (losses, norms):
        spread = max(found.values()) - min(found.values())
        assert spread <= 1e-4 * max(found.values()), f"the ways disagree: {found}"
    return best


def print_line(cell: Cell, *columns: dict[str, float]) -> None:
    """A's figure and the ratios of the others to it."""
    print(f"{cell.vocab_size:7} {cell.num_rows:5} {cell.teacher:7} {cell.head:7}", end="")
    for values in columns:
        first = values["A naive"]
        ratios = [f"{values[n] / first:6.3f}" if n in values else "     -" for n in WAYS]
        print(f" | {first:8.2f}", *ratios[1:], end="")
    print(flush=True)


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=list(VOCABS))
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--teacher", nargs="+", choices=TEACHERS)
    parser.add_argument("--large", action="store_true", help="every teacher, shape and way")
    parser.add_argument("--divergence", default="reverse_kl")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    return_freed_memory()
    columns = "B C D E F over A"
    print(f"vocab   rows teacher head    | A in s, then {columns} | A in MiB, then {columns}")
    lines: list[dict[str, object]] = []
    for cell in cells(options):
        names = ways_of(cell, options.large)
        small = make_problem(cell._replace(vocab_size=1_000, num_rows=8), options.divergence)
        problem = make_problem(cell, options.divergence)
        memory = {n: peak_mib(partial(WAYS[n], problem), partial(WAYS[n], small)) for n in names}
        rounds = 2 if cell.num_rows < 500 else 1
        seconds = in_child(partial(measure_times, problem, names, rounds))
        lines.append({**cell._asdict(), "seconds": seconds, "peak_mib": memory})
        print_line(cell, seconds, memory)
    if options.json is not None:
        options.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
