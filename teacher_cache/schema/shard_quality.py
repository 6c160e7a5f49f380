"""Defines the losses of a shard's records against the teacher, as its commit record stores them.

Measured for each shard alone (pipeline/fidelity/shard_quality.py), rounded to four digits, and
judged by pipeline/fidelity/recommend.py. Records with every logit lose nothing and have none.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from teacher_cache.schema.options import RecordKind, holds
from teacher_cache.schema.strict_json import StrictRecord

MatchName = Literal["raw_l1", "prob_l1"]


def measured_records(records: RecordKind) -> RecordKind:
    """The lossy piece of records with top-k logits; hidden states beside them lose nothing."""
    return "topk+sketch" if holds(records, "sketch") else "topk"


def rounded(value: float) -> float:
    """The value rounded to four digits."""
    return float(f"{value:.4g}")


def quantile(ascending: Float[Tensor, " N"], share: float) -> float:
    """The quantile `share` of N >= 1 ascending values; always one of them (the next above)."""
    return rounded(float(ascending[math.ceil(share * (len(ascending) - 1))]))


@dataclass(frozen=True, slots=True, kw_only=True)
class TailMass(StrictRecord):
    """Quantiles over positions of the probability outside a record's kept entries."""

    num_positions: int
    median: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, log_tails: Float[Tensor, " N"]) -> "TailMass | None":
        """The quantiles over N positions; None for no positions."""
        ascending = log_tails.to(torch.float64).exp().sort().values
        if not len(ascending):
            return None
        shares = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
        found = {name: quantile(ascending, share) for name, share in shares.items()}
        return cls(num_positions=len(ascending), **found)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledLoss(StrictRecord):
    """Losses of some samples of a shard, as readers decode them, against all teacher logits.

    The teacher's vision states, average-pooled 2 x 2 per view, stand in for a student.
    """

    num_samples: int
    num_pairs: int
    """Matched pairs of all views."""
    metric: MatchName
    """The measured metric: the paper's if the records support it."""
    regret: float
    """Excess cost of the records' matchings, as a share of a random matching's excess."""
    agreement: float
    """Share of the exact matchings' pairs that the records' matchings contain."""
    gradient_cosine: float
    """Mean over views: cosine of the reverse KL's gradient (default tail policy) with the gradient
    from all logits."""
    energy: float | None
    """Share of the logits' squared distance from their calibrated mean that lies in the sketch's
    directions; None without a sketch."""
    row_mean_spread: float
    """Mean over views: standard deviation over tokens of the mean logit. Raw L1 depends on it,
    softmax does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardQuality(StrictRecord):
    """The measured losses of one shard; None where the shard has nothing to measure."""

    vision_tail: TailMass | None
    """Over stored vision records; a shared record counts once."""
    response_tail: TailMass | None
    sampled: SampledLoss | None
