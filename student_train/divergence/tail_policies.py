"""Resolves which tail policy a signal gets, and what is then known of the teacher's probabilities.

    exact         no assumption: refused unless every logit is known
    blend         the chain rule with an estimated tail, whose part is weighted: the position's
                  sketch, or else the cache's template of an average tail (`blend_template`)
    bucket        the chain rule without that part: one outcome of mass tau
    renormalise   no tail at all: both sides are restricted to what is kept

Flat tails (tau spread evenly, or the sketch's mean logit everywhere) are not offered: under the
reverse KL they push a peaked student towards uniform, and a flat one away from its teacher
(docs/method.md). Dimensions as in teacher_output.py.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from student_train.config.objective import TailPolicy, UsedTail
from student_train.ops.precision import at_least_float32
from student_train.signals.teacher_signal import Signal
from student_train.signals.top_k import TopKSignal


class TeacherLogProbs(NamedTuple):
    """The teacher's log-probabilities as far as a policy knows or estimates them."""

    kept: Float[Tensor, "P K"]
    tail_mass: Float[Tensor, " P"]
    """Of all entries outside the kept ones together."""
    tail_entries: Float[Tensor, "P _"] | None
    """Of each of them, estimated: [P, V], where kept entries mean nothing, or [P, 1] for a flat
    tail. None where not asked for."""


def resolve_tail(policy: TailPolicy, signal: Signal, temperature: float = 1.0) -> UsedTail:
    """The policy used for a signal; the only place where a default changes.

    Exact signals are `exact` under any policy. `blend` needs a shape of the tail: the sketch's or
    the cache's template (`blend_template`). Without either it becomes `bucket`. ValueError for
    `exact` on a signal that is not, and for a temperature other than 1 on a record that cannot
    recompute the mass of its tail.
    """
    if not isinstance(signal, TopKSignal) or signal.exact:
        return "exact"
    if policy == "exact":
        raise ValueError(
            f"tail=exact, but the cache holds the {signal.min_kept} largest of "
            f"{signal.vocab_size} logits; build it with records `hidden`, or choose the tail "
            "policy blend, bucket or renormalise"
        )
    if policy == "renormalise" or signal.sketch is not None:
        return policy
    if temperature != 1:
        raise ValueError(
            f"at temperature {temperature} the mass of the tail is not the stored one, and a "
            "top-k record without a sketch cannot recompute it; use temperature 1, "
            "tail=renormalise, or records `hidden` (`topk+sketch` sketches vision tokens only)"
        )
    return "blend_template" if policy == "blend" and signal.template is not None else "bucket"


def estimate_weight(tail: UsedTail, blend: float) -> float:
    """Weight of the estimated tail's part under a resolved policy."""
    return blend if tail in ("blend", "blend_template") else 0.0


def needs_sketch(tail: UsedTail, temperature: float) -> bool:
    """Whether a resolved policy reads all logits of the sketch."""
    return tail == "blend" or (tail == "bucket" and temperature != 1)


@torch.no_grad()
def teacher_log_probs(
    teacher: TopKSignal, tail: UsedTail, temperature: float, *, estimated: bool
) -> TeacherLogProbs:
    """What a resolved policy knows of the teacher and, with `estimated`, of each tail entry."""
    if temperature == 1:
        entries: Tensor | None = None
        if estimated:
            template = tail == "blend_template"
            entries = teacher.templated_log_probs() if template else teacher.estimated_log_probs()
        log_tail = at_least_float32(teacher.record.log_tail)
        return TeacherLogProbs(teacher.kept_log_probs(), log_tail, entries)
    log_p = functional.log_softmax(teacher.estimated_log_probs() / temperature, dim=1)
    ids_PK = teacher.record.ids.long()
    tail_mass = log_p.scatter(1, ids_PK, -torch.inf).logsumexp(dim=1)
    return TeacherLogProbs(log_p.gather(1, ids_PK), tail_mass, log_p if estimated else None)
