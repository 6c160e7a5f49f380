"""Settings of a training objective: its terms, their weights and options.

Defaults are EM-KD's where the paper states them and the project's documented choice where it is
silent (docs/method.md lists them all). Imports nothing heavy: `emkd --help` reads this.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from pydantic import model_validator

from student_train.config.schedules import ScheduleName
from teacher_cache.schema.strict_json import StrictRecord

MatchMetric = Literal["raw_l1", "centred_l1", "prob_l1", "hidden_cosine", "hidden_l2"]
MatchScope = Literal["view", "global"]
CorrespondenceName = Literal["hungarian", "local", "spatial", "greedy", "nearest", "random"]
TailPolicy = Literal["exact", "blend", "bucket", "renormalise"]
UsedTail = TailPolicy | Literal["blend_template"]
"""The policy used for a signal: `blend_template` is `blend` with the cache's template of an average
tail, where a position has no sketch."""
DivergenceName = Literal["reverse_kl", "forward_kl", "jsd"]
VladText = Literal["all", "instruction", "response"]
EpicName = Literal[
    "epic-tcd", "epic-lcd", "epic-icd", "epic-cached-tcd", "epic-cached-lcd", "epic-cached-icd"
]
ObjectiveName = Literal["supervised", "rld", "emkd"] | EpicName

TERMS = ("supervised", "rld", "kd", "vsd", "vlad")

_ABSENT_TERMS: dict[str, tuple[str, ...]] = {
    "supervised": ("rld", "kd", "vsd", "vlad"),
    "rld": ("kd", "vsd", "vlad"),
    "emkd": ("kd",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchingConfig(StrictRecord):
    """How student vision tokens are paired with teacher vision tokens."""

    correspondence: CorrespondenceName = "hungarian"
    """How costs become pairs (student_train/matching/correspondences): `hungarian`, the least total
    cost, is the paper's; `local` does so inside a token's own window of the view; `spatial` adds
    squared distances; `greedy`, `nearest` and `random` are controls."""
    place_weight: float = 0.0
    """Weight of squared distances against mean costs, for `spatial`."""
    metric: MatchMetric = "raw_l1"
    """Cost of a pair: L1 of raw logits (the paper), of row-centred logits or of probabilities; or,
    of hidden states of equal widths, one minus their cosine or their Euclidean distance."""
    scope: MatchScope = "view"
    """One assignment per view (teacher and student share the grid of views) or one per image."""
    num_shared_ids: int | None = 3072
    """Vocabulary rows, drawn once by seed, at which L1 costs of raw logits are summed; None sums
    over the whole vocabulary. Fewer rows are faster and less exact (docs/method.md)."""
    certify: bool = False
    """Prove which pairs are those of the exact costs. Needs a bound of the costs' error: prob_l1
    without a sketch, or raw_l1 over the whole vocabulary from hidden states."""

    def __post_init__(self) -> None:
        if self.num_shared_ids is not None and self.num_shared_ids < 1:
            raise ValueError(
                f"num_shared_ids must be >= 1, or None for all, found {self.num_shared_ids}"
            )
        if not (self.place_weight >= 0 and math.isfinite(self.place_weight)):
            raise ValueError(f"place_weight must be >= 0 and finite, found {self.place_weight}")
        if self.place_weight and self.correspondence != "spatial":
            raise ValueError(
                f"place_weight would have no effect: correspondence is {self.correspondence}, "
                "which weighs no distances; omit it, or take correspondence spatial"
            )
        if self.scope == "global" and self.correspondence in ("local", "spatial"):
            raise ValueError(
                f"correspondence {self.correspondence} needs the places of tokens, which scope "
                "global does not know: an image's views may lie anywhere in it; take scope view"
            )
        if self.certify and self.correspondence != "hungarian":
            raise ValueError(
                "certify proves which pairs of least total cost are those of the exact costs; "
                f"found correspondence {self.correspondence}; omit it, or take hungarian"
            )

    @model_validator(mode="before")
    @classmethod
    def _drop_solver(cls, stored: Any) -> Any:
        """Read runs and config files written while the solver was a choice."""
        if not isinstance(stored, dict) or "solver" not in stored:
            return stored
        fields: dict[str, Any] = dict(stored)
        solver = fields.pop("solver")
        if solver != "scipy":
            raise ValueError(
                f"solver is {solver!r}, but SciPy's is the only one now; omit the field"
            )
        return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig(StrictRecord):
    """loss = supervised_weight * supervised + rld_weight * RLD + kd_weight * KD
    + vsd_weight * VSD + vlad_weight * VLAD; a term of weight 0 is not computed."""

    name: ObjectiveName = "emkd"
    supervised_weight: float = 0.5
    rld_weight: float = 0.5
    kd_weight: float = 0.0
    """EPIC's consistency term (lambda): forward KL on response tokens, from the student itself with
    more vision tokens (`epic-*`) or from the cached teacher (`epic-cached-*`, a variant)."""
    vsd_weight: float = 0.25
    vlad_weight: float = 25.0
    temperature: float = 1.0
    """Softmax temperature of VSD, RLD and KD; values are multiplied by its square."""
    divergence: DivergenceName = "reverse_kl"
    """What VSD and RLD measure: KL(student || teacher) as in EM-KD, the other direction, or the
    Jensen-Shannon divergence of both. EPIC's KD is always forward."""
    tail: TailPolicy = "blend"
    """What the divergences assume of the mass outside a teacher's top-k. Signals that carry every
    logit (hidden states, k = V) are always exact; `exact` refuses all others."""
    blend: float = 0.5
    """Weight of the unknown tail term of the chain rule under `blend` (0 is `bucket`)."""
    vlad_text: VladText = "all"
    smooth_l1_beta: float = 1.0
    matching: MatchingConfig = MatchingConfig()

    def __post_init__(self) -> None:
        for term in TERMS:
            if getattr(self, f"{term}_weight") < 0:
                raise ValueError(f"{term}_weight must be >= 0")
        for term in _ABSENT_TERMS.get(self.name, ()):
            if getattr(self, f"{term}_weight") != 0:
                raise ValueError(
                    f"objective {self.name!r} has no {term} term, found {term}_weight "
                    f"{getattr(self, f'{term}_weight')}; set it to 0 or take objective "
                    f"{'epic-tcd' if term == 'kd' else 'emkd'!r}"
                )
        if self.epic_schedule is not None and self.kd_weight == 0:
            raise ValueError(
                f"objective {self.name!r} is its kd term, found kd_weight 0; without it, take "
                "objective 'supervised' with a schedule"
            )
        if not any(getattr(self, f"{term}_weight") for term in TERMS):
            raise ValueError("every term has weight 0; there is nothing to train on")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, found {self.temperature}")
        if not 0 <= self.blend <= 1:
            raise ValueError(f"blend must lie in [0, 1], found {self.blend}")
        if self.smooth_l1_beta <= 0:
            raise ValueError(f"smooth_l1_beta must be > 0, found {self.smooth_l1_beta}")

    @property
    def needs_vision(self) -> bool:
        """Whether the objective matches vision tokens."""
        return self.vsd_weight > 0 or self.vlad_weight > 0

    def require_sampled_costs(self) -> None:
        """Raise ValueError unless matching uses a sample of the vocabulary."""
        matching = self.matching
        if self.needs_vision and matching.correspondence != "hungarian":
            raise ValueError(
                "match_check_steps compares assignments of least total cost, found correspondence "
                f"{matching.correspondence}; set match_check_steps to 0"
            )
        sampled = matching.metric in ("raw_l1", "centred_l1") and matching.num_shared_ids
        if not self.needs_vision or not sampled:
            found = f"matching by {matching.metric} with num_shared_ids {matching.num_shared_ids}"
            raise ValueError(
                "match_check_steps compares costs summed at num_shared_ids vocabulary rows with "
                f"those over all: found {found if self.needs_vision else 'nothing to match'}, "
                "so there is nothing to check; set match_check_steps to 0"
            )

    @property
    def epic_schedule(self) -> ScheduleName | None:
        """The schedule that an EPIC objective is named after, None for others."""
        if not self.name.startswith("epic-"):
            return None
        return cast(ScheduleName, self.name.rpartition("-")[2])

    @property
    def kd_from_cache(self) -> bool:
        """Whether KD's teacher is the cached one (a variant) instead of the student itself."""
        return self.name.startswith("epic-cached-")


def preset(name: ObjectiveName) -> ObjectiveConfig:
    """The objectives of EM-KD's ablation (SFT, SFT + RLD, EM-KD whole) and EPIC's.

    EPIC's weights are those of notes on the paper, (1 - lambda) and lambda = 0.7; its released code
    has 0.5.
    """
    if name == "emkd":
        return ObjectiveConfig(name=name)
    if name == "rld":
        return ObjectiveConfig(name=name, vsd_weight=0.0, vlad_weight=0.0)
    alone = ObjectiveConfig(
        name="supervised", supervised_weight=1.0, rld_weight=0.0, vsd_weight=0.0, vlad_weight=0.0
    )
    if name == "supervised":
        return alone
    return replace(alone, name=name, supervised_weight=0.3, kd_weight=0.7)
