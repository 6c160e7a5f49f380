"""The settings of a training objective: which terms, their weights, and every choice of theirs.

Defaults are EM-KD's where the paper states them and the project's documented choice where it is
silent (docs/method.md lists them all). Imports nothing heavy: `emkd --help` reads this.
"""

from dataclasses import dataclass
from typing import Literal

from teacher_cache.decode import Strict

MatchMetric = Literal["raw_l1", "centred_l1", "prob_l1", "hidden_cosine"]
MatchScope = Literal["view", "global"]
TailPolicy = Literal["exact", "blend", "bucket", "renormalise"]
VladText = Literal["all", "instruction", "response"]
ObjectiveName = Literal["supervised", "rld", "emkd"]

_ABSENT_TERMS: dict[ObjectiveName, tuple[str, ...]] = {
    "supervised": ("rld", "vsd", "vlad"),
    "rld": ("vsd", "vlad"),
    "emkd": (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchingConfig(Strict):
    """How student vision tokens are paired with teacher vision tokens."""

    metric: MatchMetric = "raw_l1"
    """Cost of a pair: L1 of raw logits (the paper), of row-centred logits, of probabilities, or
    one minus the cosine of hidden states (equal widths only)."""
    scope: MatchScope = "view"
    """One assignment per view (teacher and student share the grid of views) or one per image."""
    num_shared_ids: int | None = 8192
    """Vocabulary rows, drawn once by seed, at which L1 costs of a sketch or of hidden states are
    summed; None sums over the whole vocabulary."""
    certify: bool = False
    """Prove which pairs are those of the exact costs. Needs a bound of the costs' error: prob_l1
    without a sketch, or raw_l1 over the whole vocabulary of a signal that knows it."""

    def __post_init__(self) -> None:
        if self.num_shared_ids is not None and self.num_shared_ids < 1:
            raise ValueError(
                f"num_shared_ids must be >= 1, or None for all, found {self.num_shared_ids}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig(Strict):
    """loss = supervised_weight * supervised + rld_weight * RLD + vsd_weight * VSD
    + vlad_weight * VLAD; a term of weight 0 is not computed."""

    name: ObjectiveName = "emkd"
    supervised_weight: float = 0.5
    rld_weight: float = 0.5
    vsd_weight: float = 0.25
    vlad_weight: float = 25.0
    temperature: float = 1.0
    """Softmax temperature of VSD and RLD; values are multiplied by its square."""
    tail: TailPolicy = "blend"
    """What the divergences assume of the mass outside a teacher's top-k. Signals that carry every
    logit (hidden states, k = V) are always exact; `exact` refuses all others."""
    blend: float = 0.5
    """Weight of the unknown tail term of the chain rule under `blend` (0 is `bucket`)."""
    vlad_text: VladText = "all"
    smooth_l1_beta: float = 1.0
    matching: MatchingConfig = MatchingConfig()

    def __post_init__(self) -> None:
        for term in ("supervised", "rld", "vsd", "vlad"):
            if getattr(self, f"{term}_weight") < 0:
                raise ValueError(f"{term}_weight must be >= 0")
        for term in _ABSENT_TERMS[self.name]:
            if getattr(self, f"{term}_weight") != 0:
                raise ValueError(
                    f"objective {self.name!r} has no {term} term, found {term}_weight "
                    f"{getattr(self, f'{term}_weight')}; set it to 0 or take objective 'emkd'"
                )
        if self.supervised_weight + self.rld_weight + self.vsd_weight + self.vlad_weight == 0:
            raise ValueError("every term has weight 0; there is nothing to train on")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, found {self.temperature}")
        if not 0 <= self.blend <= 1:
            raise ValueError(f"blend must lie in [0, 1], found {self.blend}")
        if self.smooth_l1_beta <= 0:
            raise ValueError(f"smooth_l1_beta must be > 0, found {self.smooth_l1_beta}")

    @property
    def needs_vision(self) -> bool:
        """Whether vision tokens are matched at all."""
        return self.vsd_weight > 0 or self.vlad_weight > 0


def preset(name: ObjectiveName) -> ObjectiveConfig:
    """The three objectives of the paper's ablation: SFT, SFT + RLD, and EM-KD whole."""
    if name == "supervised":
        return ObjectiveConfig(
            name=name, supervised_weight=1.0, rld_weight=0.0, vsd_weight=0.0, vlad_weight=0.0
        )
    if name == "rld":
        return ObjectiveConfig(name=name, vsd_weight=0.0, vlad_weight=0.0)
    return ObjectiveConfig(name=name)
