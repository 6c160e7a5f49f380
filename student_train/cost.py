"""What it costs to pair a student vision token with a teacher vision token.

    raw_l1         sum_v |s_v - t_v|        over raw logits: the paper's Manhattan distance
    centred_l1     the same after each row's mean is taken off: blind to the logits' free constant
    prob_l1        sum_v |q_v - p_v|        over probabilities, between 0 and 2
    hidden_cosine  1 - cos(h_s, h_t)        over final hidden states of one width

Raw and centred L1 are summed at `num_shared_ids` vocabulary rows, drawn once by a fixed seed for
all images (as good as all V at a fraction of the work), and refused on a top-k
record without a sketch, whose matching would be wrong (errors of both: docs/method.md).
No tensor of N x M x V entries appears, and no gradient. Dimensions as in schema.py.
"""

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from student_train.objective import MatchingConfig
from student_train.signals import HiddenSignal, Signal
from student_train.top_k_signal import TopKSignal, at_least_float32
from teacher_cache.topk import row_chunks

_SHARED_IDS_SEED = 20251121


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
    ids = shared_ids(teacher.vocab_size, config.num_shared_ids).to(student_logits.device)
    student_NC = at_least_float32(student_logits[:, ids])
    teacher_MC = teacher.logits_at(ids).to(student_NC.dtype)
    if config.metric == "centred_l1":
        student_NC = student_NC - student_NC.mean(dim=1, keepdim=True)
        teacher_MC = teacher_MC - teacher_MC.mean(dim=1, keepdim=True)
    return torch.cdist(student_NC, teacher_MC, p=1)


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
    """L1 of probabilities over the whole vocabulary, teacher rows in chunks of bounded size."""
    student_NV = at_least_float32(student_logits).softmax(dim=1)
    chunks = row_chunks(teacher.num_rows, teacher.vocab_size)
    index = torch.arange(teacher.num_rows, device=student_logits.device)
    blocks = [
        torch.cdist(student_NV, _probabilities(teacher.rows(index[rows])).to(student_NV), p=1)
        for rows in chunks
    ]
    return torch.cat(blocks, dim=1)


def _probabilities(teacher: Signal) -> Tensor:
    """Teacher probabilities [M, V]; a top-k record without a sketch gets a uniform tail.

    The tail's mass tau is exact, so each entry of the cost is off by at most 2 tau, and in
    practice matches hardly differ for tau below 0.02 (docs/method.md). A uniform tail misleads
    gradients of the reverse KL, not this distance, in which tiny probabilities hardly count.
    """
    if not isinstance(teacher, TopKSignal) or teacher.exact:
        return at_least_float32(teacher.dense_logits()).softmax(dim=1)
    if teacher.sketch is not None:
        return teacher.estimated_log_probs().exp()
    kept = teacher.kept_log_probs().exp()
    num_outside = teacher.vocab_size - teacher.counts
    share = at_least_float32(teacher.log_tail).exp() / num_outside.clamp(min=1)
    base = share[:, None].expand(-1, teacher.vocab_size).to(kept.dtype)
    return base.scatter(1, teacher.ids.long(), kept)
