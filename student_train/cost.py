"""What it costs to pair a student vision token with a teacher vision token.

    raw_l1         sum_v |s_v - t_v|        over raw logits: the paper's Manhattan distance
    centred_l1     the same after each row's mean is taken off: blind to the logits' free constant
    prob_l1        sum_v |q_v - p_v|        over probabilities, between 0 and 2
    hidden_cosine  1 - cos(h_s, h_t)        over final hidden states of one width

Raw and centred L1 are summed at `num_shared_ids` vocabulary rows, drawn once by a fixed seed for
all images (as good as all V at a fraction of the work), or at all V, teacher columns decoded block
by block; they are refused on a top-k record without a sketch, whose matching would be wrong
(errors of all: docs/method.md). Neither N x M x V nor M x V entries are ever held at once, nor is
a gradient. Dimensions as in schema.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from student_train.l1 import l1_distances, l1_rounding
from student_train.objective import MatchingConfig
from student_train.signals import HiddenSignal, Signal
from student_train.sparse_l1 import sparse_probability_l1
from student_train.top_k_signal import TopKSignal, at_least_float32
from teacher_cache.topk import row_chunks

_SHARED_IDS_SEED = 20251121
_COLUMNS_AT_ONCE = 8192
"""Teacher logits are decoded at this many vocabulary rows at a time."""


@lru_cache(maxsize=8)
def shared_ids(vocab_size: int, num_shared_ids: int | None) -> Int[Tensor, " C"]:
    """The vocabulary rows, ascending, at which L1 costs are summed; all of them for None.

    Every image, run and machine compares the same rows: they follow from the two sizes alone.
    """
    if num_shared_ids is None or num_shared_ids >= vocab_size:
        return torch.arange(vocab_size)
    generator = torch.Generator().manual_seed(_SHARED_IDS_SEED)
    return torch.randperm(vocab_size, generator=generator)[:num_shared_ids].sort().values


@torch.no_grad()
def cost_matrix(
    student_hidden: Float[Tensor, "N D"],
    student_logits: Float[Tensor, "N W"] | None,
    teacher: Signal,
    config: MatchingConfig,
) -> Float[Tensor, "N M"]:
    """Cost of every pair under `config.metric` (EM-KD: vision token matching); float32 or wider.

    The student's W >= V logits are cut to the V rows of the teacher; hidden_cosine needs none.
    ValueError where the teacher's record cannot serve the metric, with the records that can.
    """
    if config.metric == "hidden_cosine":
        return _hidden_cosine(student_hidden, teacher)
    if student_logits is None:
        raise ValueError(f"matching by {config.metric} needs the student's vision logits")
    if student_logits.shape[1] < teacher.vocab_size:
        raise ValueError(
            f"the student has {student_logits.shape[1]} vocabulary rows, the teacher's cache "
            f"{teacher.vocab_size}: they do not share a tokenizer"
        )
    if config.metric == "prob_l1":
        return _probability_l1(student_logits[:, : teacher.vocab_size], teacher)
    if isinstance(teacher, TopKSignal) and not teacher.exact and teacher.sketch is None:
        raise ValueError(
            f"matching by {config.metric} needs logits outside the top {teacher.least_kept}, "
            "which this cache does not hold: build it with records `topk+sketch` or `hidden`, "
            "or match by prob_l1"
        )
    return _logit_l1(student_logits, teacher, config)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostError:
    """Bound of the error of each cost: a share of the cost and, by teacher token, a constant."""

    relative: float
    absolute: Float[Tensor, " M"]

    def of(self, cost: Float[Tensor, "N M"]) -> Float[Tensor, "N M"]:
        """The bound for every entry of `cost`, in float64 on the CPU."""
        return self.relative * cost.to("cpu", torch.float64).abs() + self.absolute


def cost_error(teacher: Signal, config: MatchingConfig, dtype: torch.dtype) -> CostError:
    """How far `cost_matrix`, in `dtype`, can be from the costs of every logit, rounding included.

    Exact signals: raw_l1 over all of V, prob_l1. Bare top-k records: prob_l1, whose uniform tail
    moves at most twice the tail's mass; kept logits count as they are stored. ValueError where no
    bound is known: at shared ids and on sketches the error is measured, not bounded
    (docs/method.md), and the other metrics round in ways that nobody has bounded.
    """
    num_ids, rounding = config.num_shared_ids, l1_rounding(teacher.vocab_size, dtype)
    if config.metric == "raw_l1" and teacher.exact and (num_ids or torch.inf) >= teacher.vocab_size:
        return CostError(relative=rounding, absolute=torch.zeros(teacher.num_rows).double())
    bare = isinstance(teacher, TopKSignal) and teacher.sketch is None
    if config.metric == "prob_l1" and (teacher.exact or bare):
        # Probabilities of both sides: their sum is added up eight at a time at the worst, and the
        # exponent of one that is not zero carries at most 104 (768 in float64) units of rounding.
        softmax = torch.finfo(dtype).eps * (teacher.vocab_size / 8 + 1000)
        absolute = torch.full((teacher.num_rows,), 2 * (softmax + rounding), dtype=torch.float64)
        if isinstance(teacher, TopKSignal) and not teacher.exact:
            absolute += 2 * teacher.log_tail.to("cpu", torch.float64).exp() * (1 + softmax)
        return CostError(relative=0.0, absolute=absolute)
    raise ValueError(
        f"no bound is known for the error of {config.metric} on this record, so no pair can be "
        "certified: match by prob_l1 on records without a sketch or, with records `hidden`, by "
        "raw_l1 with num_shared_ids=None; or set certify=False"
    )


def _logit_l1(student_logits: Tensor, teacher: Signal, config: MatchingConfig) -> Tensor:
    """Raw or centred L1 at the shared ids, block by block; centring takes a pass of its own."""
    ids = shared_ids(teacher.vocab_size, config.num_shared_ids).to(student_logits.device)
    dtype = at_least_float32(student_logits).dtype
    cost = student_logits.new_zeros(len(student_logits), teacher.num_rows, dtype=dtype)
    student_mean: Tensor | float = 0.0
    teacher_mean: Tensor | float = 0.0
    if config.metric == "centred_l1":
        for own, theirs in _blocks(student_logits, teacher, ids):
            student_mean = student_mean + own.sum(dim=1, keepdim=True) / len(ids)
            teacher_mean = teacher_mean + theirs.sum(dim=1, keepdim=True) / len(ids)
    for own, theirs in _blocks(student_logits, teacher, ids):
        cost += l1_distances(own - student_mean, theirs - teacher_mean)
    return cost


def _blocks(
    student_logits: Tensor, teacher: Signal, ids: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of both sides at a few vocabulary rows at a time, in one dtype."""
    for block in ids.split(_COLUMNS_AT_ONCE):
        own = at_least_float32(student_logits[:, block])
        yield own, teacher.logits_at(block).to(own.dtype)


def _hidden_cosine(student: Tensor, teacher: Signal) -> Tensor:
    if not isinstance(teacher, HiddenSignal):
        raise ValueError(
            "matching by hidden_cosine needs the teacher's states: build the cache with records "
            "`hidden`, or match by raw_l1"
        )
    if student.shape[1] != teacher.hidden.shape[1]:
        raise ValueError(
            f"matching by hidden_cosine needs equal widths, found student {student.shape[1]} and "
            f"teacher {teacher.hidden.shape[1]}; match by raw_l1, which compares logits"
        )
    wide = at_least_float32(student)
    unit_student = functional.normalize(wide, dim=1)
    unit_teacher = functional.normalize(teacher.hidden.to(wide.dtype), dim=1)
    return 1 - unit_student @ unit_teacher.T


def _probability_l1(student_logits: Tensor, teacher: Signal) -> Tensor:
    """L1 of probabilities over the whole vocabulary; bare top-k records never become dense.

    Without a sketch the tail is uniform. Its mass tau is exact, so each cost is off by at most
    2 tau, and in practice matches hardly differ for tau below 0.02 (docs/method.md). A uniform tail
    misleads gradients of the reverse KL, not this distance, in which tiny probabilities hardly
    count. All other signals are decoded a few teacher rows at a time.
    """
    if isinstance(teacher, TopKSignal) and not teacher.exact and teacher.sketch is None:
        return sparse_probability_l1(student_logits, teacher)
    student_NV = at_least_float32(student_logits).softmax(dim=1)
    index = torch.arange(teacher.num_rows, device=student_logits.device)
    blocks = [
        l1_distances(student_NV, _probabilities(teacher.rows(index[rows])).to(student_NV))
        for rows in row_chunks(teacher.num_rows, teacher.vocab_size)
    ]
    return torch.cat(blocks, dim=1) if blocks else student_NV.new_zeros(len(student_NV), 0)


def _probabilities(teacher: Signal) -> Tensor:
    """Teacher probabilities [M, V] of a signal that knows or estimates every logit."""
    if isinstance(teacher, TopKSignal) and not teacher.exact:
        return teacher.estimated_log_probs().exp()
    return at_least_float32(teacher.dense_logits()).softmax(dim=1)
