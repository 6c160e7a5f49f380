"""Bytes that distances and losses move, way by way, counted without any GPU.

    python -m benchmarks.gpu.gpu --counts

A chunk of logits goes through the terms of a block as `head_loss` sends it: values, and the
gradient where the logits were, but for the products with the head. Told as multiples of one reading
of the chunk in its own dtype, of which the floor takes two: logits read, gradient written. Counted
on a tenth of the vocabulary; what does not grow with it is small.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.bytes_moved import (
    bytes_moved,
    l1_additions,
    l1_least_bytes,
    l1_pair_bytes,
    l1_tile_bytes,
)
from student_train.config.objective import DivergenceName, ObjectiveConfig
from student_train.divergence.divergence import DIVERGENCES
from student_train.divergence.tail_policies import teacher_log_probs
from student_train.head.fused_loss import HeadRows, head_loss
from student_train.head.linear_head import LinearHead
from student_train.losses.logit_terms import LogitTerm, SupervisedTerm, divergence_term, head_rows
from student_train.signals.sketch_code import SketchCode
from student_train.signals.top_k import TopKSignal
from teacher_cache.records.sketch import SketchBasis
from teacher_cache.schema.teacher_output import TopKRecord

TOP_K, CHUNK_ROWS = 64, 144
L1_SHAPES = ((144, 576), (196, 729), (576, 2880))
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm"}


class HeadProblem(NamedTuple):
    """States, a head, and what is asked of their logits."""

    hidden: Tensor
    head: LinearHead
    rows: HeadRows

    def forget(self) -> None:
        """No gradient from before."""
        self.hidden.grad = self.head.weight.grad = None


def make_head_problem(
    num_rows: int,
    vocab_size: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    divergence: DivergenceName = "reverse_kl",
    sketched: bool = False,
    trained: bool = True,
) -> HeadProblem:
    """Supervised loss and a divergence from the top 64 of a made-up teacher, or, with a sketch of
    its tail, the divergence alone."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = normal(vocab_size, width).mul_(4 / width**0.5).to(device, dtype)
    hidden = normal(num_rows, width).to(device, dtype).requires_grad_()
    teacher = made_up_teacher(num_rows, vocab_size, sketched=sketched, device=device)
    objective = ObjectiveConfig(divergence=divergence)
    name = "vsd" if sketched else "rld"
    terms: list[LogitTerm] = [divergence_term(name, 0.5, teacher, objective)]
    if not sketched:
        labels = torch.randint(vocab_size, (num_rows,), generator=generator).to(device)
        terms.insert(0, SupervisedTerm(weight=0.5, response_ids=labels))
    head = LinearHead(weight=weight.requires_grad_(trained))
    return HeadProblem(hidden, head, head_rows(hidden, terms))


def made_up_teacher(
    num_rows: int, vocab_size: int, *, sketched: bool, device: torch.device
) -> TopKSignal:
    """A tenth of each row's mass lies outside what is kept."""
    generator = torch.Generator().manual_seed(5)
    num_kept = min(TOP_K, vocab_size // 2)
    stride = vocab_size // num_kept  # distinct ids a row, anywhere
    first = torch.randint(stride, (num_rows, num_kept), generator=generator)
    logits = torch.randn(num_rows, num_kept, generator=generator).mul_(3)
    logits = logits.sort(dim=1, descending=True).values
    tail = torch.full((num_rows,), 0.1)
    record = TopKRecord(
        ids=(first + stride * torch.arange(num_kept)).int(),
        logits=logits,
        logsumexp=logits.logsumexp(dim=1) - torch.log1p(-tail),
        log_tail=tail.log(),
        log_least=torch.full((num_rows,), -30.0),
        vocab_size=vocab_size,
    )
    sketch = _sketch(num_rows, vocab_size, device) if sketched else None
    return TopKSignal(record=record, sketch=sketch).to(device)


def _sketch(num_rows: int, vocab_size: int, device: torch.device, rank: int = 4) -> SketchCode:
    basis = SketchBasis(
        hidden_mean=torch.zeros(rank),
        projection=torch.eye(rank),
        mean_logits=torch.zeros(vocab_size),
        directions=torch.ones(vocab_size, rank, dtype=torch.float16),
    ).to(device)
    codes = torch.ones(num_rows, rank, dtype=torch.int8)
    shift = torch.full((num_rows,), -20.0)
    return SketchCode(codes=codes, scale=torch.ones(num_rows), tail_shift=shift, basis=basis)


def torch_readings(
    divergence: DivergenceName, sketched: bool, dtype: torch.dtype, vocab_size: int
) -> float:
    """Bytes that torch moves for a chunk of logits, as so many readings of it."""
    problem = make_head_problem(
        CHUNK_ROWS, vocab_size, 2, torch.device("cpu"), dtype,
        divergence=divergence, sketched=sketched, trained=False,
    )  # fmt: skip
    found = bytes_moved(lambda: head_loss(problem.head, [problem.rows]).total.backward())
    moved = sum(count for name, count in found.items() if name not in _PRODUCTS)
    return moved / (CHUNK_ROWS * vocab_size * dtype.itemsize)


def kernel_readings(sketched: bool, dtype: torch.dtype, vocab_size: int) -> float:
    """The same for the kernels: two readings and a writing of the chunk, two readings of the bits
    and of the estimate, whose making is left to torch, and the maxima written and searched."""
    from student_train.ops.logit_rows_triton import GROUP

    bits, maxima = 2 / 8, 2 * 4 / GROUP
    estimate = (2 * 4 + _estimate_bytes(vocab_size)) if sketched else 0.0
    return 3 + (bits + maxima + estimate) / dtype.itemsize


def _estimate_bytes(vocab_size: int) -> float:
    """What torch moves for each entry of an estimate that it makes of a sketch."""
    device = torch.device("cpu")
    teacher = made_up_teacher(CHUNK_ROWS, vocab_size, sketched=True, device=device)
    found = bytes_moved(lambda: teacher_log_probs(teacher.decode(), "blend", 1.0, estimated=True))
    moved = sum(count for name, count in found.items() if name not in _PRODUCTS)
    return moved / (CHUNK_ROWS * vocab_size)


def print_counts(vocab_size: int) -> None:
    """The tables of docs/gpu.md."""
    from benchmarks.gpu.compiled_kernels import compiled_kernels
    from student_train.ops import l1_triton
    from student_train.ops.logit_rows_triton import COLUMNS

    print("L1: bytes asked for, in GB, and additions, in 10^9\n")
    print("| pairs, columns | torch.cdist | kernel | least | additions |")
    print("| --- | --- | --- | --- | --- |")
    tile = l1_triton.TILE["TILE_N"], l1_triton.TILE["TILE_M"]
    for pair in L1_SHAPES:
        sizes = (*pair, vocab_size)
        asked = [
            l1_pair_bytes(*sizes),
            l1_tile_bytes(*sizes, tile, l1_triton.SPAN),
            l1_least_bytes(*sizes),
            l1_additions(*sizes),
        ]
        numbers = " | ".join(f"{number / 1e9:,.2f}" for number in asked)
        print(f"| {pair[0]} x {pair[1]}, {vocab_size:,} | {numbers} |")
    print("\nLosses of a chunk of logits: bytes moved, as readings of the chunk; the least is 2\n")
    print("| terms | float32: torch | kernels | bfloat16: torch | kernels |")
    print("| --- | --- | --- | --- | --- |")
    counted = vocab_size // 10
    for sketched in (False, True):
        for divergence in DIVERGENCES:
            cells: list[str] = []
            for dtype in (torch.float32, torch.bfloat16):
                served = not sketched or divergence == "reverse_kl"
                cells.append(f"{torch_readings(divergence, sketched, dtype, counted):.1f}")
                kernels = kernel_readings(sketched, dtype, counted)
                cells.append(f"{kernels:.1f}" if served else "torch's")
            terms = f"{divergence}, blend" if sketched else f"supervised + {divergence}, bucket"
            print(f"| {terms} | {' | '.join(cells)} |")
    print("\nCompiled kernels\n")
    print("| kernel | dtype | chip | registers | spilled bytes | shared bytes | instructions |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for each in compiled_kernels():
        count = f"{each.instructions / COLUMNS * 128:.0f} a column"
        if each.loop_additions:
            count = f"in loop {each.loop_instructions}, additions {each.loop_additions}"
        print(
            f"| {each.kernel} | {each.dtype} | {each.chip} | {each.registers} | "
            f"{each.local_bytes} | {each.shared_bytes} | {count} |"
        )
