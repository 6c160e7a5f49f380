"""Computes the cost of pairing each student vision token with each teacher vision token.

    raw_l1         sum_v |s_v - t_v|        over raw logits: the paper's Manhattan distance
    centred_l1     the same minus each row's mean: ignores the logits' free constant
    prob_l1        sum_v |q_v - p_v|        over probabilities, between 0 and 2
    hidden_cosine  1 - cos(h_s, h_t)        over final hidden states of one width
    hidden_l2      |h_s - h_t|              the same, with their lengths

Raw and centred L1 are summed at `num_shared_ids` vocabulary rows, drawn by a fixed seed, or at all
V. Raw logits are refused on a top-k record without a sketch: their matching would be wrong (errors
of all metrics: docs/method.md). Never held: N x M x V or M x V entries, N x V where logits come
from the student's head, a gradient. Dimensions as in teacher_output.py, B problems of n student and
m teacher tokens: N = B n, M = B m.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache, reduce
from typing import NamedTuple, TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from student_train.config.objective import MatchingConfig
from student_train.head.linear_head import LogitsOf
from student_train.head.student_logits import StudentLogits
from student_train.matching.top_k_l1_cost import sparse_probability_l1
from student_train.ops.l1 import l1_distances
from student_train.ops.precision import at_least_float32
from student_train.signals.teacher_signal import HiddenSignal, Signal
from student_train.signals.top_k import TopKSignal
from teacher_cache.records.lm_head import row_chunks

_SHARED_IDS_SEED = 20251121
_COLUMNS_AT_ONCE = 8192
"""Teacher logits are decoded at this many vocabulary rows at a time."""
_TOGETHER = 2**21
"""Most logits and costs of problems that are computed together: 8 MiB in float32. Beyond this size,
call overhead is negligible."""


@lru_cache(maxsize=8)
def shared_ids(vocab_size: int, num_shared_ids: int | None) -> Int[Tensor, " C"]:
    """Return the vocabulary rows, ascending, at which L1 costs are summed; all of them for None.

    They depend on the two sizes alone: every image, run and machine compares the same rows.
    """
    if num_shared_ids is None or num_shared_ids >= vocab_size:
        return torch.arange(vocab_size)
    generator = torch.Generator().manual_seed(_SHARED_IDS_SEED)
    return torch.randperm(vocab_size, generator=generator)[:num_shared_ids].sort().values


class Costs(NamedTuple):
    """The cost of every pair of each problem, and the mean logits of the student."""

    cost: Float[Tensor, "B n m"]
    """Float32 or wider."""
    mean_logits: Float[Tensor, "B n"] | None
    """Of each student token, over the compared vocabulary rows; None for costs of states."""


def cost_matrix(
    student_hidden: Float[Tensor, "N D"],
    student_logits: Float[Tensor, "N W"] | LogitsOf | None,
    teacher: Signal,
    config: MatchingConfig,
) -> Float[Tensor, "N M"]:
    """Return the cost of every pair under `config.metric`; float32 or wider.

    `student_logits` are the student's W >= V logits or the head that computes them; they are cut to
    the teacher's V rows. Costs of hidden states need neither.
    ValueError where the teacher's record cannot serve the metric; it names the records that can.
    """
    return pair_costs(student_hidden, student_logits, teacher, config).cost[0]


def problems_at_once(
    num_students: int, num_teachers: int, teacher: Signal, config: MatchingConfig
) -> int:
    """Return how many problems of n student and m teacher tokens `pair_costs` should take at once.

    Depends on sizes alone, so that equal batches are always grouped alike.
    """
    num_columns = teacher.vocab_size
    if isinstance(teacher, HiddenSignal) and config.metric in ("hidden_cosine", "hidden_l2"):
        num_columns = teacher.hidden.shape[1]
    elif config.metric != "prob_l1":
        num_columns = min(num_columns, _COLUMNS_AT_ONCE, config.num_shared_ids or num_columns)
    num_costs = 4 * num_students * num_teachers  # l1.py holds those of a few strips
    return max(1, _TOGETHER // ((num_students + num_teachers) * num_columns + num_costs))


@torch.no_grad()
def pair_costs(
    student_hidden: Float[Tensor, "N D"],
    student_logits: Float[Tensor, "N W"] | LogitsOf | None,
    teacher: Signal,
    config: MatchingConfig,
    num_problems: int = 1,
) -> Costs:
    """Compute `cost_matrix` for each of several problems of one shape, and the mean logits.

    Rows of both sides are those of the problems, one after another (`problems_at_once` says how
    many). Autocast applies to the head only.
    """
    require_comparable(student_hidden, teacher, config)
    plain = torch.autocast(student_hidden.device.type, enabled=False)
    if config.metric in ("hidden_cosine", "hidden_l2"):
        with plain:
            return Costs(_state_distances(student_hidden, teacher, config, num_problems), None)
    if student_logits is None:
        raise ValueError(f"matching by {config.metric} needs the student's vision logits")
    student = StudentLogits.of(student_hidden, student_logits, teacher.vocab_size)
    with plain:
        if config.metric == "prob_l1":
            return _probability_l1(student, teacher, num_problems)
        return _logit_l1(student, teacher, config, num_problems)


def require_comparable(
    student_hidden: Float[Tensor, "N D"], teacher: Signal, config: MatchingConfig
) -> None:
    """ValueError, with the remedy, where the teacher's record cannot serve the metric."""
    metric = config.metric
    if metric in ("raw_l1", "centred_l1") and _is_bare(teacher):
        raise ValueError(
            f"matching by {metric} needs logits outside the top {teacher.min_kept}, which this "
            "cache does not hold: build it with records `topk+sketch` or `hidden`, or match by "
            "prob_l1"
        )
    if metric not in ("hidden_cosine", "hidden_l2"):
        return
    if not isinstance(teacher, HiddenSignal):
        raise ValueError(
            f"matching by {metric} needs the teacher's states: build the cache with records "
            "`hidden`, or match by raw_l1"
        )
    if student_hidden.shape[1] != teacher.hidden.shape[1]:
        raise ValueError(
            f"matching by {metric} needs equal widths, found student {student_hidden.shape[1]} and "
            f"teacher {teacher.hidden.shape[1]}; match by raw_l1, which compares logits"
        )


def _is_bare(teacher: Signal) -> TypeGuard[TopKSignal]:
    """Whether nothing is known of logits outside the top-k."""
    return isinstance(teacher, TopKSignal) and not teacher.exact and teacher.sketch is None


def _logit_l1(
    student: StudentLogits, teacher: Signal, config: MatchingConfig, num_problems: int
) -> Costs:
    """Raw or centred L1 at the shared ids, block by block; centring needs one more pass."""
    ids = shared_ids(teacher.vocab_size, config.num_shared_ids).to(student.hidden.device)

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [B, n, C] and [B, m, C] at a few vocabulary rows at a time, in one dtype."""
        columns = student.blocks(ids, _COLUMNS_AT_ONCE)
        for block, logits in zip(ids.split(_COLUMNS_AT_ONCE), columns, strict=True):
            own, theirs = at_least_float32(logits), teacher.logits_at(block)
            dtype = torch.promote_types(own.dtype, theirs.dtype)
            yield _apart(own.to(dtype), num_problems), _apart(theirs.to(dtype), num_problems)

    if config.metric == "raw_l1":
        cost, total_Bn = _added(
            (l1_distances(own, theirs), own.sum(dim=2)) for own, theirs in blocks()
        )
        return Costs(cost, total_Bn / len(ids))
    held = [*blocks()] if len(ids) <= _COLUMNS_AT_ONCE else []
    total_Bn1, total_Bm1 = _added(
        (own.sum(dim=2, keepdim=True), theirs.sum(dim=2, keepdim=True))
        for own, theirs in held or blocks()
    )
    mean_Bn1, mean_Bm1 = total_Bn1 / len(ids), total_Bm1 / len(ids)
    distances = (
        l1_distances(own - mean_Bn1, theirs - mean_Bm1) for own, theirs in held or blocks()
    )
    return Costs(reduce(torch.add, distances), mean_Bn1[:, :, 0])


def _apart(rows: Tensor, num_problems: int) -> Tensor:
    """The rows of each problem: [B n, C] as [B, n, C]."""
    return rows.view(num_problems, len(rows) // num_problems, rows.shape[1])


def _added(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sums the first entries of all pairs, and the second ones."""
    return reduce(lambda left, right: (left[0] + right[0], left[1] + right[1]), pairs)


def _state_distances(
    student: Tensor, teacher: Signal, config: MatchingConfig, num_problems: int
) -> Tensor:
    assert isinstance(teacher, HiddenSignal)
    own = _apart(at_least_float32(student), num_problems)
    theirs = _apart(teacher.hidden.to(own.dtype), num_problems)
    if config.metric == "hidden_l2":
        return torch.cdist(own, theirs, compute_mode="donot_use_mm_for_euclid_dist")
    return 1 - functional.normalize(own, dim=2) @ functional.normalize(theirs, dim=2).mT


def _probability_l1(student: StudentLogits, teacher: Signal, num_problems: int) -> Costs:
    """L1 of probabilities over the whole vocabulary; top-k records without a sketch stay sparse.

    Without a sketch the tail is uniform. Its mass tau is exact, so each cost is off by at most
    2 tau; matches hardly differ for tau below 0.02 (docs/method.md).
    """
    costs: list[Tensor] = []
    means: list[Tensor] = []
    for chunk in student.chunks:  # several chunks only for a single problem
        logits_BnV = _apart(student.rows(chunk), num_problems)
        means.append(at_least_float32(logits_BnV).mean(dim=2))
        if _is_bare(teacher):
            size = teacher.num_rows // num_problems
            each = [teacher.rows(slice(b * size, (b + 1) * size)) for b in range(num_problems)]
            found = map(sparse_probability_l1, logits_BnV, each)
            costs.append(torch.stack(list(found)))
        else:
            costs.append(_dense_probability_l1(logits_BnV, teacher))
    return Costs(torch.cat(costs, dim=1), torch.cat(means, dim=1))


def _dense_probability_l1(logits_BnV: Tensor, teacher: Signal) -> Tensor:
    """Against a signal that knows or estimates every logit, a few teacher rows at a time."""
    own_BnV = at_least_float32(logits_BnV).softmax(dim=2)
    blocks = [own_BnV.new_zeros(*own_BnV.shape[:2], 0)]
    # As for the student: one chunk holds all teachers of several problems, or of a single one.
    for rows in row_chunks(teacher.num_rows, teacher.vocab_size):
        theirs = _probabilities(teacher.rows(rows)).to(own_BnV)
        blocks.append(l1_distances(own_BnV, _apart(theirs, len(own_BnV))))
    return torch.cat(blocks, dim=2)


def _probabilities(teacher: Signal) -> Tensor:
    """Teacher probabilities [M, V] of a signal that knows or estimates every logit."""
    if isinstance(teacher, TopKSignal) and not teacher.exact:
        return teacher.estimated_log_probs().exp()
    return at_least_float32(teacher.dense_logits()).softmax(dim=1)
