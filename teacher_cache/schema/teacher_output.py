"""Defines the records of a teacher's output for one sample.

Records check themselves: shapes agree and numbers are finite.

Dimensions, in every file:
    B batch, L sequence positions, T text (content) tokens, X text tokens used by VLAD,
    R response tokens, M teacher vision tokens, N student vision tokens, P matched pairs,
    V vocabulary rows shared by teacher and student, K kept entries, S sketch rank, D width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from teacher_cache.schema.samples import Sample, ViewGrid
from teacher_cache.schema.tensor_record import TensorRecord

MAX_VOCAB_SIZE = 2**24
"""Most vocabulary rows of top-k records."""


def _require_finite(name: str, values: Tensor) -> None:
    # A finite sum has finite terms, and takes a tenth of the time of isfinite.
    dtype = torch.float32 if values.dtype == torch.float16 else None  # float16 ends at 65,504
    if not math.isfinite(values.sum(dtype=dtype)) and not bool(values.isfinite().all()):
        count = int((~torch.isfinite(values)).sum())
        raise ValueError(f"{name}: {count} of {values.numel()} values are NaN or infinite")


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKRecord(TensorRecord):
    """The K largest logits of each position, and their normalisers.

    `logits` are raw (temperature 1) in the teacher's dtype, descending, ties by smaller id.
    `logsumexp` is over the V shared rows. `log_tail` is the log of the probability outside the kept
    entries, computed from the discarded logits themselves; -inf where all are kept.

    `num_kept` is the number of kept entries per position (1..K); None: all K. The rest of a row
    repeats its first entry: scattering by `ids` is then harmless, and only sums over entries must
    exclude the repetitions (`kept_mask`).
    `log_least` is a lower bound of all V log-probabilities: the least of them, rounded down; or
    None.
    """

    ids: Int[Tensor, "N K"]
    logits: Float[Tensor, "N K"]
    logsumexp: Float[Tensor, " N"]
    log_tail: Float[Tensor, " N"]
    vocab_size: int
    num_kept: Int[Tensor, " N"] | None = None
    log_least: Float[Tensor, " N"] | None = None

    def __post_init__(self) -> None:
        num_kept = self.ids.shape[1]
        if not num_kept <= self.vocab_size <= MAX_VOCAB_SIZE:
            rows = f"{self.vocab_size} vocabulary rows (of at most {MAX_VOCAB_SIZE})"
            raise ValueError(f"top-k of {num_kept} entries from {rows}")
        low, high = map(int, self.ids.aminmax()) if self.ids.numel() else (0, 0)
        if not 0 <= low <= high < self.vocab_size:
            raise ValueError(f"token ids span {low}..{high}, expected 0..{self.vocab_size - 1}")
        _require_finite("logits", self.logits)
        _require_finite("logsumexp", self.logsumexp)
        if self.num_kept is not None:
            self._require_padding(self.num_kept)
        if self.log_least is not None and not bool((self.log_least <= 0).all()):
            raise ValueError("log_least: found NaN or a value above 0, expected log-probabilities")
        whole = self.counts == self.vocab_size
        _require_finite("log_tail", self.log_tail[~whole])
        if bool((self.log_tail[whole] != -torch.inf).any()):
            raise ValueError("log_tail must be -inf where every vocabulary row is kept")

    @property
    def counts(self) -> Int[Tensor, " N"]:
        """Number of entries that each position keeps."""
        if self.num_kept is not None:
            return self.num_kept
        return torch.full(self.logsumexp.shape, self.ids.shape[1], device=self.ids.device)

    @property
    def kept_mask(self) -> Bool[Tensor, "N K"]:
        """True at kept entries; the others repeat the row's first entry."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.counts[:, None]

    def _require_padding(self, num_kept: Tensor) -> None:
        low, high = map(int, num_kept.aminmax()) if num_kept.numel() else (1, 1)
        if not 1 <= low <= high <= self.ids.shape[1]:
            raise ValueError(
                f"positions keep {low}..{high} entries, expected 1..{self.ids.shape[1]}"
            )
        kept = self.kept_mask
        for name, values in (("ids", self.ids), ("logits", self.logits)):
            if bool(((values != values[:, :1]) & ~kept).any()):
                raise ValueError(f"{name} beyond a position's kept entries must repeat its first")


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchRecord(TensorRecord):
    """PCA code of each vision position's hidden state in the head's metric (records/sketch.py).

    The logit of vocabulary row v is approximately `mean[v] + scale * codes @ directions[v]`.
    `tail_shift`, added to these logits, gives them the true probability outside the top k.
    """

    codes: Int[Tensor, "M S"]
    scale: Float[Tensor, " M"]
    tail_shift: Float[Tensor, " M"]

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int8:
            raise ValueError(f"sketch codes are int8, found {self.codes.dtype}")
        _require_finite("scale", self.scale)
        _require_finite("tail_shift", self.tail_shift)


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenRecord:
    """States that enter the LM head (after the final norm); they determine all other records."""

    vision: Float[Tensor, "M D"]
    text: Float[Tensor, "X D"]
    predicting: Float[Tensor, "R D"]

    def __post_init__(self) -> None:
        for name in ("vision", "text", "predicting"):
            _require_finite(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class AffinityRecord:
    """Cosine of last hidden states, of every VLAD text token with every vision token."""

    cosine: Float[Tensor, "X M"]

    def __post_init__(self) -> None:
        _require_finite("affinity", self.cosine)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherOutput:
    """All that is cached of the teacher for one sample.

    Tier `hidden` has `hidden` alone. Tier `topk` has `vision`, `affinity` and `response`; tier
    `topk+sketch` also has `sketch`. Response records are taken at the *predicting* positions: row i
    is the teacher's distribution over response token i.

    `shared_from` is the key of an earlier sample with equal input up to the last vision token; then
    `views`, `vision`, `sketch` and the vision states of `hidden` are that sample's.
    The grids map the share of dropped vision tokens to `response` and `hidden.predicting`.
    """

    views: tuple[ViewGrid, ...]
    content_ids: Int[Tensor, " T"]
    is_response: Bool[Tensor, " T"]
    after_image: Bool[Tensor, " T"]
    vision: TopKRecord | None = None
    sketch: SketchRecord | None = None
    affinity: AffinityRecord | None = None
    response: TopKRecord | None = None
    hidden: HiddenRecord | None = None
    shared_from: str | None = None
    response_grid: Mapping[float, TopKRecord] | None = None
    hidden_grid: Mapping[float, Float[Tensor, "R D"]] | None = None

    def __post_init__(self) -> None:
        num_vision = sum(view.num_tokens for view in self.views)
        num_response = int(self.is_response.sum())
        num_text = int(self.after_image.sum())
        found: list[tuple[str, object, object]] = []
        if self.vision is not None:
            found.append(("vision top-k rows", len(self.vision.ids), num_vision))
        if self.sketch is not None:
            found.append(("sketch rows", len(self.sketch.codes), num_vision))
        responses = {} if self.response is None else {0.0: self.response}
        for ratio, record in (responses | dict(self.response_grid or {})).items():
            found.append((f"response top-k rows (ratio {ratio})", len(record.ids), num_response))
        for ratio, states in (self.hidden_grid or {}).items():
            _require_finite(f"predicting states (ratio {ratio})", states)
            found.append((f"predicting states (ratio {ratio})", len(states), num_response))
        if self.affinity is not None:
            found.append(("affinity", tuple(self.affinity.cosine.shape), (num_text, num_vision)))
        if self.hidden is not None:
            wanted = {"vision": num_vision, "text": num_text, "predicting": num_response}
            found += [(f"{n} states", len(getattr(self.hidden, n)), c) for n, c in wanted.items()]
        for name, have, want in found:
            if have != want:
                raise ValueError(f"{name}: found {have}, expected {want} from the token spans")


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedSample:
    """One row of a shard: a sample and the teacher's output for it."""

    sample: Sample
    output: TeacherOutput
