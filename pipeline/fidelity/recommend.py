"""Recommends a tier from what a pilot found, and lays both out as text; no tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.fidelity.sizes import Cost, Tier, TierSize, cost_lines
from pipeline.fidelity.tables import human_bytes, table

PROXY_STUDENT = "the teacher's own vision states, average-pooled 2 x 2 per view"
"""Replaces the student, which does not exist yet."""

MAX_REGRET = 0.01
"""Largest acceptable regret: excess of the exact matching cost, as a share of a random matching's.
A sketch of a few hundred directions reaches it. Top-k alone loses 14-37 % of raw L1, and a greedy
matching of the exact costs 0.4-7 % (docs/method.md)."""
MAX_TAIL = 0.02
"""Largest mass outside the top k (90th percentile) at which top-k alone may match by probability.
Each cost is then off by at most twice that and regret stays below 0.1 %; at mass 0.4, 2-6 %."""
MIN_GRADIENT_COSINE = 0.9
"""Smallest acceptable cosine between the reverse KL's gradient and the exact one. A sketch reaches
0.95-0.996 near the teacher, where the proxy student is; farther away, omissions weigh more."""
EXACT_IS_WORTH = 1.25
"""A tier that keeps everything may take this many times the bytes of the cheapest passing tier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierTail:
    """Probability outside the top k, over positions."""

    top_k: int
    vision_median: float
    vision_p90: float
    response_median: float
    response_p90: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TierMeasure:
    """One tier on the pilot's samples; sizes are measured, after compression.

    `regret` and `agreement` (tier_loss.py) are None if the tier cannot serve the metric. `tail_p90`
    is 0 except for top-k records alone.
    """

    size: TierSize
    layout_per_vision_token: float
    regret: float | None
    agreement: float | None
    gradient_cosine: float
    tail_p90: float

    @property
    def tier(self) -> Tier:
        """Which tier."""
        return self.size.tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """One tier, the flags of `emkd build` that choose it, and the reason."""

    tier: str
    flags: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotReport:
    """Everything that a pilot found.

    `samples`, `vision_tokens` and `response_tokens` count what was measured. `energy` maps r to the
    share of the vision logits' variance that r directions hold. `row_mean_spread` is the standard
    deviation over a view's tokens of the mean logit, which raw L1 sees and softmax ignores.
    `samples_per_image` counts samples with images per vision record that a build would store.
    """

    samples: int
    rejected: tuple[str, ...]
    calibration_tokens: int
    vision_tokens: int
    response_tokens: int
    vocab_size: int
    hidden_size: int
    match_metric: str
    teacher_seconds_per_sample: float
    tails: tuple[TierTail, ...]
    energy: dict[int, float]
    samples_per_image: float
    row_mean_spread: float
    tiers: tuple[TierMeasure, ...]
    cost: Cost
    recommendation: Recommendation


def recommend(measured: Sequence[TierMeasure]) -> Recommendation:
    """The cheapest tier that passes, or `hidden` if that costs little more.

    `faults` decides what passes. The passing tier with the fewest bytes wins, unless a passing
    `hidden` tier takes at most `EXACT_IS_WORTH` times as many. If none passes, float32 states.
    """
    ordered = sorted(measured, key=lambda item: item.size.in_all)
    missed = {
        item.tier: faults(item.tier, item.regret, item.gradient_cosine, item.tail_p90)
        for item in ordered
    }
    passing = [item for item in ordered if not missed[item.tier]]
    if not passing:
        worst = "; ".join(f"{tier.name}: {', '.join(found)}" for tier, found in missed.items())
        tier = Tier(records="hidden", hidden_dtype="float32")
        return _recommended(tier, f"no tier passes ({worst}), and float32 states lose least")
    cheapest = passing[0]
    exact = next((item for item in passing if item.tier.records == "hidden"), None)
    limit = EXACT_IS_WORTH * cheapest.size.in_all
    if exact is not None and exact is not cheapest and exact.size.in_all <= limit:
        return _recommended(
            exact.tier,
            f"it keeps everything and takes {exact.size.in_all / cheapest.size.in_all:.2f} times "
            f"the bytes of the cheapest tier that passes, {cheapest.tier.name}",
        )
    cheaper = [item for item in ordered if item.size.in_all < cheapest.size.in_all]
    ruled_out = [f"{item.tier.name} ({', '.join(missed[item.tier])})" for item in cheaper]
    reason = "it takes the fewest bytes of all tiers that pass"
    if ruled_out:
        reason += "; cheaper ones do not pass: " + "; ".join(ruled_out)
    return _recommended(cheapest.tier, reason)


def _recommended(tier: Tier, reason: str) -> Recommendation:
    return Recommendation(tier=tier.name, flags=tier.flags, reason=reason)


def faults(tier: Tier, regret: float | None, gradient_cosine: float, tail_p90: float) -> list[str]:
    """Why a tier with these numbers does not pass; empty if it passes."""
    found: list[str] = []
    if regret is None:
        found.append("cannot match by raw logits")
    elif regret > MAX_REGRET:
        found.append(f"regret {regret:.1%}, expected at most {MAX_REGRET:.0%}")
    if gradient_cosine < MIN_GRADIENT_COSINE:
        found.append(
            f"gradient cosine {gradient_cosine:.2f}, expected at least {MIN_GRADIENT_COSINE}"
        )
    if tier.records == "topk" and tail_p90 > MAX_TAIL:
        found.append(f"tail mass {tail_p90:.2f} (90 %), expected at most {MAX_TAIL}")
    return found


def render_pilot(report: PilotReport) -> str:
    """The report for a terminal."""
    planned = f"{report.cost.num_samples:,} samples"
    shares = [
        (tail.vision_median, tail.vision_p90, tail.response_median, tail.response_p90)
        for tail in report.tails
    ]
    tails = table(
        ("tail mass outside top k", "vision median", "90 %", "response median", "90 %"),
        [
            (f"k={tail.top_k}", *(f"{share:.4f}" for share in own))
            for tail, own in zip(report.tails, shares, strict=True)
        ],
    )
    tiers = table(
        ("records", "B / token", "packed", "per sample", planned, "regret", "agree", "gradient"),
        [_cells(item) for item in report.tiers],
    )
    energy = ", ".join(f"{held:.1%} by r={rank}" for rank, held in report.energy.items())
    lines = [
        f"{report.calibration_tokens:,} vision tokens fitted the sketch; measured on "
        f"{report.samples} other samples with {report.vision_tokens:,} vision and "
        f"{report.response_tokens:,} response tokens.",
        f"{report.samples_per_image:.3g} samples with images share a vision record.",
        f"V = {report.vocab_size:,}, D = {report.hidden_size:,}, "
        f"{report.teacher_seconds_per_sample:.3g} teacher seconds per sample.",
        *(f"rejected: {reason}" for reason in report.rejected),
        "",
        tails,
        "",
        f"Variance of vision logits held: {energy}.",
        f"Spread of the mean logit over a view's tokens: {report.row_mean_spread:.3g}.",
        "",
        tiers,
        "B / token, packed: bytes of a vision token's records before and after compression.",
        f"regret, agree: matching by {report.match_metric}; gradient: cosine of the reverse KL's;",
        "all against every logit. Proxy for the student:",
        f"{PROXY_STUDENT}.",
        *cost_lines(report.cost),
        "",
        f"Recommended: {report.recommendation.flags}",
        f"because {report.recommendation.reason}.",
    ]
    return "\n".join(lines)


def _cells(item: TierMeasure) -> tuple[str, ...]:
    return (
        item.tier.name,
        f"{item.layout_per_vision_token:,.0f}",
        f"{item.size.per_vision_token:,.0f}",
        human_bytes(item.size.per_sample),
        human_bytes(item.size.in_all),
        "-" if item.regret is None else f"{item.regret:.2%}",
        "-" if item.agreement is None else f"{item.agreement:.0%}",
        f"{item.gradient_cosine:.3f}",
    )
