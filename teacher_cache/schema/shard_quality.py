"""What a shard's records lose of the teacher, in numbers that stand in its commit record.

Measured while the teacher was loaded (fidelity/shard_quality.py), of this shard alone: nothing here
is added up over shards, so that whoever reads a cache may do so from its commit records. Numbers
have four digits; what counts as too much is not a fact and stands elsewhere
(pipeline/fidelity/recommend.py). Records that keep every logit lose nothing, and have none of this.
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
    """The part of top-k records that loses something: hidden states beside them do not."""
    return "topk+sketch" if holds(records, "sketch") else "topk"


def rounded(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def quantile(ascending: Float[Tensor, " N"], share: float) -> float:
    """The first of N >= 1 values that `share` of all steps from the first to the last lie below."""
    return rounded(float(ascending[math.ceil(share * (len(ascending) - 1))]))


@dataclass(frozen=True, slots=True, kw_only=True)
class TailMass(StrictRecord):
    """Quantiles, over positions, of the probability outside what a record keeps."""

    num_positions: int
    median: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, log_tails: Float[Tensor, " N"]) -> "TailMass | None":
        """Of N positions; None where there is none."""
        ascending = log_tails.to(torch.float64).exp().sort().values
        if not len(ascending):
            return None
        return cls(
            num_positions=len(ascending),
            median=quantile(ascending, 0.5),
            p90=quantile(ascending, 0.9),
            p99=quantile(ascending, 0.99),
            max=quantile(ascending, 1.0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledLoss(StrictRecord):
    """Some samples of a shard, as readers will have them, against every logit of the teacher.

    In place of a student: the teacher's own vision states, average-pooled 2 x 2 per view.
    """

    num_samples: int
    num_pairs: int
    """Pairs of all their views' matchings."""
    metric: MatchName
    """The matching that was measured: the paper's where the records can serve it."""
    regret: float
    """Excess of the exact cost under the records' matchings, as a share of a random one's."""
    agreement: float
    """Share of the exact matchings' pairs that are found."""
    gradient_cosine: float
    """Of the reverse KL, under its default tail policy, with that of every logit; over views."""
    energy: float | None
    """Share of the logits' squared distance from their calibrated mean that the sketch's
    directions hold; None without a sketch."""
    row_mean_spread: float
    """Standard deviation over a view's tokens of the mean logit, which raw L1 sees and softmax
    does not; over views."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardQuality(StrictRecord):
    """What is said of one shard; a part is None where the shard has nothing to measure it on."""

    vision_tail: TailMass | None
    """Over the vision records that are stored; those that share one are not counted again."""
    response_tail: TailMass | None
    sampled: SampledLoss | None
