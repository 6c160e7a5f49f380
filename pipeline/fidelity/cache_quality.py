"""Reports what a cache keeps of its teacher, from its commit records: table, verdict, warning.

Everything comes from the seal. The mean over the shards is judged by the rule that recommends a
tier (recommend.py); the worst shard is named. A cache that also holds hidden states is shown but
not judged: students learn from those. The alternative offered is hidden states, which always pass;
a pilot measures the tiers between.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.fidelity.recommend import (
    MAX_REGRET,
    MAX_TAIL,
    MIN_GRADIENT_COSINE,
    Recommendation,
    TierMeasure,
    faults,
    recommend,
)
from pipeline.fidelity.sizes import SampleShape, Tier, TierSize, asset_bytes, column_bytes
from pipeline.fidelity.tables import table
from teacher_cache.schema.manifest import Seal
from teacher_cache.schema.options import holds
from teacher_cache.schema.shard_quality import (
    SampledLoss,
    ShardQuality,
    TailMass,
    measured_records,
    rounded,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheQuality:
    """The quality of a cache, its shards, and the verdict."""

    tier: Tier
    """The records that were measured."""
    mean: ShardQuality
    shards: tuple[ShardQuality | None, ...]
    """In order; None for a shard that was not measured."""
    worst: int | None
    """The shard furthest beyond the stated quality, or nearest to it; None if none has images."""
    faults: tuple[str, ...]
    """How the mean misses the stated quality; empty if it does not."""
    num_missing: int
    """Shards that miss it individually."""
    instead: Recommendation | None
    """What to build instead if there are faults."""


def summarise(seal: Seal) -> CacheQuality | None:
    """The quality of a cache; None if its records keep every logit, or if nothing was measured."""
    shards = tuple(commit.quality for commit in seal.shards)
    found = [quality for quality in shards if quality is not None]
    if not found:
        return None
    spec = seal.spec
    records = measured_records(spec.records)
    rank = spec.sketch_rank if holds(records, "sketch") else None
    tier = Tier(records=records, top_k=spec.top_k, sketch_rank=rank)
    mean = _mean(found)
    judged = not holds(spec.records, "hidden")
    missed = tuple(_faults(tier, mean)) if judged else ()
    measured = [i for i, each in enumerate(shards) if each is not None and each.sampled is not None]
    return CacheQuality(
        tier=tier,
        mean=mean,
        shards=shards,
        worst=max(measured, key=lambda index: _severity(tier, shards[index]), default=None),
        faults=missed,
        num_missing=sum(bool(_faults(tier, quality)) for quality in found) if judged else 0,
        instead=_instead(tier, mean, seal) if missed else None,
    )


def is_unknown(seal: Seal) -> bool:
    """Whether students would learn from records whose quality was not measured."""
    lossy = not holds(seal.spec.records, "hidden")
    return lossy and all(commit.quality is None for commit in seal.shards)


def render_quality(quality: CacheQuality, num_shards: int = 10) -> str:
    """A table of the mean and of the worst shards, with a legend."""
    known = [index for index, each in enumerate(quality.shards) if each is not None]
    order = sorted(known, key=lambda index: -_severity(quality.tier, quality.shards[index]))
    rows = [("all", *_cells(quality.mean))]
    for index in order[:num_shards]:
        each = quality.shards[index]
        assert each is not None
        name = f"{index}, the worst" if index == quality.worst else f"{index}"
        rows.append((name, *_cells(each)))
    sampled = quality.mean.sampled
    lines = [f"What {quality.tier.name} keeps of the teacher:", table(_HEADER, rows)]
    if len(known) > num_shards:
        which = "the worst" if num_shards == 1 else f"the {num_shards} worst"
        lines.append(f"Shown: {which} of {len(known)} shards.")
    if len(known) < len(quality.shards):
        lines.append(f"{len(quality.shards) - len(known)} shards were not measured.")
    if sampled is not None:
        lines.append(
            f"samples: compared with every logit. regret, agree: matching by {sampled.metric}; "
            "gradient: cosine of the reverse KL's."
        )
    lines.append("vision, text: probability outside the kept entries, at vision tokens, responses.")
    return "\n".join(lines)


def warning_text(quality: CacheQuality, cache: str) -> str | None:
    """The warning for a cache that misses its stated quality; None if it does not."""
    if quality.instead is None:
        return None
    rule = "!" * 80
    lines = [
        rule,
        f"{cache}: its records, {quality.tier.name}, miss their stated quality:",
        *(f"  {fault}" for fault in quality.faults),
        f"{quality.num_missing} of {len(quality.shards)} shards miss it individually; the worst "
        f"is shard {quality.worst}.",
        f"Build into a new folder, with {quality.instead.flags}",
        "or a tier between the two: emkd plan --pilot measures the loss and the bytes of each.",
        rule,
    ]
    return "\n".join(lines)


_HEADER = (
    *("shard", "samples", "regret", "agree", "gradient", "energy", "spread"),
    *("vision 50 %", "90 %", "99 %", "max"),
    *("text 50 %", "90 %", "99 %", "max"),
)


def _cells(quality: ShardQuality) -> tuple[str, ...]:
    loss = quality.sampled
    lost = ("-",) * 6
    if loss is not None:
        energy = "-" if loss.energy is None else f"{loss.energy:.1%}"
        lost = (
            *(f"{loss.num_samples}", f"{loss.regret:.2%}", f"{loss.agreement:.0%}"),
            *(f"{loss.gradient_cosine:.3f}", energy, f"{loss.row_mean_spread:.3g}"),
        )
    return (*lost, *_tail_cells(quality.vision_tail), *_tail_cells(quality.response_tail))


def _tail_cells(tail: TailMass | None) -> tuple[str, ...]:
    if tail is None:
        return ("-",) * 4
    return tuple(f"{value:.4f}" for value in (tail.median, tail.p90, tail.p99, tail.max))


def _faults(tier: Tier, quality: ShardQuality) -> list[str]:
    loss = quality.sampled
    if loss is None:
        return []
    return faults(tier, loss.regret, loss.gradient_cosine, _tail_p90(tier, quality))


def _tail_p90(tier: Tier, quality: ShardQuality) -> float:
    """The tail mass that the rule uses: that of top-k records alone; 0 for others."""
    tail = quality.vision_tail if tier.records == "topk" else None
    return 0.0 if tail is None else tail.p90


def _severity(tier: Tier, quality: ShardQuality | None) -> float:
    """How far a shard is beyond the stated quality; 1 at the limit."""
    if quality is None or quality.sampled is None:
        return -1.0
    loss = quality.sampled
    return max(
        loss.regret / MAX_REGRET,
        (1 - loss.gradient_cosine) / (1 - MIN_GRADIENT_COSINE),
        _tail_p90(tier, quality) / MAX_TAIL,
    )


def _mean(found: Sequence[ShardQuality]) -> ShardQuality:
    return ShardQuality(
        vision_tail=_pooled([each.vision_tail for each in found]),
        response_tail=_pooled([each.response_tail for each in found]),
        sampled=_pooled([each.sampled for each in found]),
    )


Measured = TypeVar("Measured", TailMass, SampledLoss)


def _pooled(records: Sequence[Measured | None]) -> Measured | None:
    """Sums of counts, the largest `max`, and means weighted by positions or pairs.

    A mean is None where a record lacks the value; the whole is None without a record.
    """
    known = [record for record in records if record is not None]
    if not known:
        return None
    pooled: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(known[0])):
        values = [getattr(record, name) for record in known]
        if name.startswith("num_"):
            pooled[name] = sum(values)
        elif name == "max":
            pooled[name] = max(values)
        elif name != "metric":  # one for all shards
            weights = [r.num_positions if isinstance(r, TailMass) else r.num_pairs for r in known]
            pooled[name] = None if None in values else rounded(statistics.fmean(values, weights))
    return dataclasses.replace(known[0], **pooled)


def _instead(tier: Tier, mean: ShardQuality, seal: Seal) -> Recommendation:
    """The rule's choice between the measured tier and hidden states in the teacher's dtype."""
    loss = mean.sampled
    assert loss is not None
    dtype = "bfloat16" if seal.spec.compute_dtype == "bfloat16" else "float32"
    exact = Tier(records="hidden", hidden_dtype=dtype)
    return recommend(
        [
            _measured(tier, seal, loss.regret, loss.gradient_cosine, _tail_p90(tier, mean)),
            _measured(exact, seal, 0.0, 1.0, 0.0),
        ]
    )


def _measured(
    tier: Tier, seal: Seal, regret: float, gradient_cosine: float, tail_p90: float
) -> TierMeasure:
    """A tier with its numbers; bytes of vision and response records by arithmetic."""
    spec = seal.spec
    shape = SampleShape(
        num_views=0,
        num_vision=sum(commit.num_stored_vision_tokens for commit in seal.shards),
        num_content=0,
        num_text=0,
        num_response=sum(commit.num_response_tokens for commit in seal.shards),
        hidden_size=spec.hidden_size,
        logits_dtype=spec.logits_dtype,
    )
    once = asset_bytes(tier, spec.vocab_size, spec.hidden_size, spec.logits_dtype)
    columns = sum(column_bytes(shape, tier).values())
    size = TierSize(
        tier=tier,
        per_vision_token=columns / max(1, shape.num_vision),
        per_sample=columns / seal.num_samples,
        once=once,
        in_all=float(once + columns),
    )
    return TierMeasure(
        size=size,
        layout_per_vision_token=size.per_vision_token,
        regret=regret,
        agreement=None,
        gradient_cosine=gradient_cosine,
        tail_p90=tail_p90,
    )
