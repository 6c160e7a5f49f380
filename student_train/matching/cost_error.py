"""Bounds the error of matching costs, for the option `MatchingConfig.certify`.

The bound is against the costs of every exact logit, rounding included. `certificate.py` uses it to
prove pairs. ValueError for metrics and records without a known bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from student_train.config.objective import MatchingConfig
from student_train.ops.l1 import l1_rounding
from student_train.signals.teacher_signal import Signal
from student_train.signals.top_k import TopKSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class CostError:
    """Bound of each cost's error: a share of the cost, plus a constant for each teacher token."""

    relative: float
    absolute: Float[Tensor, " M"]

    def of(self, cost: Float[Tensor, "N M"]) -> Float[Tensor, "N M"]:
        """Return the bound of every entry of `cost`, in float64 on the CPU."""
        return self.relative * cost.to("cpu", torch.float64).abs() + self.absolute


def cost_errors(
    teacher: Signal, config: MatchingConfig, cost: Float[Tensor, "B n m"]
) -> Sequence[CostError | None]:
    """Bound the costs of each problem; None for each unless `config.certify`."""
    if not config.certify:
        return [None] * len(cost)
    error = cost_error(teacher, config, cost.dtype)
    absolute_Bm = error.absolute.view(len(cost), -1)
    return [CostError(relative=error.relative, absolute=each) for each in absolute_Bm]


def cost_error(teacher: Signal, config: MatchingConfig, dtype: torch.dtype) -> CostError:
    """Bound the distance of `cost_matrix`, computed in `dtype`, from the costs of every logit.

    Known for exact signals under raw_l1 over all of V and under prob_l1, and for top-k records
    without a sketch under prob_l1: the uniform tail is off by at most twice the tail's mass; kept
    logits count as stored. ValueError elsewhere: at shared ids and on sketches the error was
    measured, not bounded (docs/method.md); the rounding of the other metrics has no bound here.
    """
    num_ids, rounding = config.num_shared_ids, l1_rounding(teacher.vocab_size, dtype)
    if config.metric == "raw_l1" and teacher.exact and (num_ids or torch.inf) >= teacher.vocab_size:
        return CostError(relative=rounding, absolute=torch.zeros(teacher.num_rows).double())
    bare = isinstance(teacher, TopKSignal) and teacher.sketch is None
    if config.metric == "prob_l1" and (teacher.exact or bare):
        # Probabilities of both sides: at worst their sum adds eight at a time. The exponent of a
        # non-zero one carries at most 104 units of rounding, besides those of a record's
        # normaliser. The teacher's may be float32 whatever the dtype of the cost.
        unit = torch.finfo(torch.float32).eps
        softmax = unit * (teacher.vocab_size / 8 + 1000)
        absolute = torch.full((teacher.num_rows,), 2 * (softmax + rounding), dtype=torch.float64)
        if isinstance(teacher, TopKSignal) and not teacher.exact:
            absolute += 2 * unit * teacher.record.logsumexp.to("cpu", torch.float64).abs()
            absolute += 2 * teacher.record.log_tail.to("cpu", torch.float64).exp() * (1 + softmax)
        return CostError(relative=0.0, absolute=absolute)
    raise ValueError(
        f"no bound is known for the error of {config.metric} on this record, so no pair can be "
        "certified: match by prob_l1 on records without a sketch or, with records `hidden`, by "
        "raw_l1 with num_shared_ids=None; or set certify=False"
    )
