"""What is assumed of a teacher's tail, where a record knows the largest logits alone.

    exact         nothing: refused unless every logit is known
    blend         the chain rule with an estimated tail, its unknown part weighted: the position's
                  sketch, or else the cache's template of an average tail (`blend_template`)
    bucket        the chain rule without that part: one outcome of mass tau
    renormalise   no tail at all: both sides are restricted to what is kept
    uniform       tau spread evenly                                           for study only
    mean_logit    each entry has the sketch's mean logit, whatever it sums to  for study only

The last two are there to be measured, not to train with: under reverse KL they pull a peaked
student towards uniform, and point a flat one away from its teacher. `docs/method.md` has figures,
and `benchmarks/training/tails.py` takes them. A run says by name which policy its values rest on
(`LossTerms.tails`), for values under two policies do not compare. Dimensions as in schema.py.
"""

import torch
from torch import Tensor
from torch.nn import functional

from student_train.config.objective import TailPolicy, UsedTail
from student_train.ops.precision import at_least_float32
from student_train.signals.teacher_signal import Signal
from student_train.signals.top_k import TopKSignal

STUDY_TAILS: frozenset[TailPolicy] = frozenset({"uniform", "mean_logit"})
"""Policies whose gradient misleads under reverse KL."""


TeacherParts = tuple[Tensor, Tensor, Tensor | None]
"""Log p of the kept entries [P, K], of the whole tail [P], and of each of its entries.

The last is [P, V], or [P, 1] where all are alike, or None where nobody asked.
"""


def resolve_tail(policy: TailPolicy, signal: Signal, temperature: float = 1.0) -> UsedTail:
    """The policy that is really used on a signal; the one place where a default changes.

    Exact signals are `exact` whatever was asked. `blend` needs a shape of the tail: the sketch's,
    or the cache's template (`blend_template`). Without either it is `bucket`, because a uniform
    tail would point the gradient of the reverse KL away from the teacher (cosine about -0.9 for a
    flat student, docs/method.md). So does `uniform`, which like `mean_logit` is there for study and
    never chosen for anybody.
    ValueError for `exact` on a signal that is not, for `mean_logit` without a sketch, and for a
    temperature that a lumped tail cannot follow or a policy for study does not know.
    """
    if not isinstance(signal, TopKSignal) or signal.exact:
        return "exact"
    if policy == "exact":
        raise ValueError(
            f"tail=exact, but the cache holds the {signal.least_kept} largest of "
            f"{signal.vocab_size} logits; build it with records `hidden`, or choose the tail "
            "policy blend, bucket or renormalise"
        )
    if policy in STUDY_TAILS and temperature != 1:
        raise ValueError(
            f"tail={policy} is for study and known at temperature 1 only, found {temperature}"
        )
    if policy == "mean_logit" and signal.sketch is None:
        raise ValueError(
            "tail=mean_logit needs a sketch to know the mean logit outside the top-k, and only "
            "vision tokens of records `topk+sketch` have one; study it with rld_weight 0, or take "
            "tail=uniform"
        )
    if policy in STUDY_TAILS or policy == "renormalise" or signal.sketch is not None:
        return policy
    if temperature != 1:
        raise ValueError(
            f"at temperature {temperature} the mass of the tail is not the stored one, and a "
            "top-k record without a sketch cannot recompute it; use temperature 1, "
            "tail=renormalise, or records `hidden` (`topk+sketch` sketches vision tokens only)"
        )
    return "blend_template" if policy == "blend" and signal.template is not None else "bucket"


def needs_sketch(tail: UsedTail, temperature: float) -> bool:
    """Whether all logits of the sketch are looked at under a policy that is really used."""
    return tail in ("blend", "mean_logit") or (tail == "bucket" and temperature != 1)


@torch.no_grad()
def teacher_parts(
    teacher: TopKSignal, policy: UsedTail, temperature: float, estimated: bool
) -> TeacherParts:
    """What a policy that is really used knows of the teacher, and perhaps estimates."""
    if temperature == 1:
        log_tail = at_least_float32(teacher.log_tail)
        estimate = _tail_estimate(teacher, policy) if estimated else None
        return teacher.kept_log_probs(), log_tail, estimate
    estimate = functional.log_softmax(teacher.estimated_log_probs() / temperature, dim=1)
    ids_PK = teacher.ids.long()
    log_tail = estimate.scatter(1, ids_PK, -torch.inf).logsumexp(dim=1)
    return estimate.gather(1, ids_PK), log_tail, estimate if estimated else None


def _tail_estimate(teacher: TopKSignal, policy: UsedTail) -> Tensor:
    if policy == "blend_template":
        return teacher.templated_log_probs()
    if policy == "uniform":
        log_tail = at_least_float32(teacher.log_tail)
        num_outside = (teacher.vocab_size - teacher.counts).to(log_tail.dtype)
        return (log_tail - num_outside.log())[:, None]
    if policy == "mean_logit":
        return (teacher.mean_tail_logit() - teacher.logsumexp)[:, None]
    return teacher.estimated_log_probs()
