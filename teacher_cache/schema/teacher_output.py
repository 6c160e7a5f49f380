"""The vocabulary: what a sample is, which of its tokens are what, what the teacher said of them.

Everything else in this repository speaks these types. They are frozen, keyword-only and check
themselves: a record that exists is a record whose shapes agree and whose numbers are finite.

Legend of dimensions, used in every file:
    B batch, L sequence positions, T text (content) tokens, X text tokens used by VLAD,
    R response tokens, M teacher vision tokens, N student vision tokens, P matched pairs,
    V vocabulary rows shared by teacher and student, K kept entries, S sketch rank, D width.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from teacher_cache.schema.strict_json import Strict

IMAGE_PLACEHOLDER = "<image>"
"""Marks the place of one image inside the text of a message, as in LLaVA's JSON files."""

MAX_VOCAB_SIZE = 2**24
"""Vocabulary rows of the largest head that top-k records are made of."""

Role = Literal["system", "user", "assistant"]


class SampleError(ValueError):
    """One sample cannot be used. Holds its id and the reason, so that callers can list it."""

    def __init__(self, sample_id: str, reason: str) -> None:
        super().__init__(f"sample {sample_id!r}: {reason}")
        self.sample_id = sample_id
        self.reason = reason

    def __reduce__(self) -> tuple[type["SampleError"], tuple[str, str]]:
        return (SampleError, (self.sample_id, self.reason))


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation; `<image>` in the text stands for one image."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An image-text conversation as the source gave it.

    `key` is a content digest (see `sample_key`), `source_id` what the source calls it, `images`
    the encoded bytes (JPEG, PNG, ...) in the order of the placeholders.
    """

    key: str
    source_id: str
    images: tuple[bytes, ...]
    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        placeholders = sum(message.text.count(IMAGE_PLACEHOLDER) for message in self.messages)
        if placeholders != len(self.images):
            raise SampleError(
                self.source_id,
                f"found {placeholders} {IMAGE_PLACEHOLDER} placeholders for {len(self.images)} "
                f"images; write one {IMAGE_PLACEHOLDER} in the text for each image",
            )
        turns = [message.role for message in self.messages if message.role != "system"]
        expected = ["user", "assistant"] * (len(turns) // 2)
        if not turns or turns != expected:
            raise SampleError(
                self.source_id,
                f"found turns {turns}, expected user and assistant in alternation, beginning "
                "with user and ending with assistant",
            )
        if any(IMAGE_PLACEHOLDER in m.text for m in self.messages if m.role != "user"):
            raise SampleError(
                self.source_id, f"{IMAGE_PLACEHOLDER} may stand in the user's messages only"
            )


def sample_key(images: Iterable[bytes], messages: Iterable[Message]) -> str:
    """The content digest that names a sample: 32 hex digits over image bytes and messages."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(hashlib.sha256(image).digest())
    turns = [[message.role, message.text] for message in messages]
    digest.update(json.dumps(turns, ensure_ascii=False).encode())
    return digest.hexdigest()[:32]


def make_sample(source_id: str, images: Iterable[bytes], messages: Iterable[Message]) -> Sample:
    """Build a `Sample` with its content key; raises `SampleError` where it does not add up."""
    images, messages = tuple(images), tuple(messages)
    key = sample_key(images, messages)
    return Sample(key=key, source_id=source_id, images=images, messages=messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewGrid:
    """One rectangle of vision tokens: a whole image, its base view, a tile or the tiles' mosaic.

    `image` counts the images of the sample, `view` the views of that image (0 is the base view
    where a family has one). Newline and separator positions are not part of the grid.
    """

    image: int
    view: int
    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1 or self.image < 0 or self.view < 0:
            raise ValueError(f"a view needs rows, cols >= 1 and image, view >= 0; found {self}")

    @property
    def num_tokens(self) -> int:
        """Vision tokens in this view."""
        return self.rows * self.cols


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSpans:
    """Which positions of one tokenised sample are what (positions count from 0, no padding).

    `vision` lists the vision tokens view after view, raster order inside a view. `content` lists
    the tokens of the messages' own text (no control tokens of the template), ascending; an
    assistant's tokens, its end-of-turn token included, are the response. VLAD reads the content
    tokens `after_image`: text before the first image has not seen it (causal attention).
    """

    views: tuple[ViewGrid, ...]
    vision: Int[Tensor, " M"]
    content: Int[Tensor, " T"]
    content_ids: Int[Tensor, " T"]
    is_response: Bool[Tensor, " T"]
    after_image: Bool[Tensor, " T"]

    def __post_init__(self) -> None:
        num_tokens = sum(view.num_tokens for view in self.views)
        if num_tokens != len(self.vision):
            raise ValueError(
                f"the views {self.views} hold {num_tokens} vision tokens, "
                f"the sequence has {len(self.vision)}"
            )
        if len(self.content) and bool((self.content[self.is_response] < 1).any()):
            raise ValueError("a response token at position 0 has no position that predicts it")

    @property
    def response(self) -> Int[Tensor, " R"]:
        """Positions of the response tokens (the labels)."""
        return self.content[self.is_response]

    @property
    def predicting(self) -> Int[Tensor, " R"]:
        """Positions whose logits predict the response tokens: one to the left of each."""
        return self.response - 1

    @property
    def vlad_text(self) -> Int[Tensor, " X"]:
        """Positions of the text tokens whose affinity to vision tokens is distilled."""
        return self.content[self.after_image]


def _require_finite(name: str, values: Tensor) -> None:
    # A sum is finite only where its terms are, and is had in a tenth of the time of isfinite.
    dtype = torch.float32 if values.dtype == torch.float16 else None  # 65,504 is soon reached
    if not math.isfinite(values.sum(dtype=dtype)) and not bool(values.isfinite().all()):
        count = int((~torch.isfinite(values)).sum())
        raise ValueError(f"{name}: {count} of {values.numel()} values are NaN or infinite")


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKRecord:
    """The K largest logits of each position, and what is needed to normalise them.

    `logits` are raw (temperature 1) in the teacher's own dtype, descending, ties by smaller id.
    `logsumexp` runs over the V shared rows. `log_tail` is the log of the probability outside the
    kept entries, computed from the discarded logits themselves; it is -inf where all are kept.

    Where positions keep different numbers of entries, `num_kept` says how many (1..K) and the
    rest of a row repeats its first entry: scattering by `ids` then writes what is there already,
    and only sums over entries have to leave the repetitions out (`kept_mask`). None: all K.
    `log_least` is a floor under all V log-probabilities, the least of them rounded down; or None.
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
            raise ValueError("log_least: the log of a probability is at most 0, and no NaN")
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
        """Which entries are kept; the others repeat the row's first one."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.counts[:, None]

    def _require_padding(self, num_kept: Tensor) -> None:
        low, high = map(int, num_kept.aminmax()) if num_kept.numel() else (1, 1)
        if not 1 <= low <= high <= self.ids.shape[1]:
            raise ValueError(f"positions keep {low}..{high} of {self.ids.shape[1]} entries")
        kept = self.kept_mask
        for name, values in (("ids", self.ids), ("logits", self.logits)):
            if bool(((values != values[:, :1]) & ~kept).any()):
                raise ValueError(f"{name} beyond a position's kept entries must repeat its first")


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchRecord:
    """PCA code of each vision position's hidden state in the head's metric (`sketch.py`).

    The logit of vocabulary row v is approximately `mean[v] + scale * codes @ directions[v]`;
    `tail_shift` moves those logits so that their mass outside the top-k is the true tail mass.
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
    """States that enter the LM head (after the final norm): everything else follows from them."""

    vision: Float[Tensor, "M D"]
    text: Float[Tensor, "X D"]
    predicting: Float[Tensor, "R D"]

    def __post_init__(self) -> None:
        for name in ("vision", "text", "predicting"):
            _require_finite(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class AffinityRecord:
    """Cosine of every VLAD text token with every vision token, of last hidden states."""

    cosine: Float[Tensor, "X M"]

    def __post_init__(self) -> None:
        _require_finite("affinity", self.cosine)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherOutput:
    """All that is cached of the teacher for one sample.

    Tier `hidden`: `hidden` alone. Tier `topk`: `vision`, `affinity`, `response`; tier
    `topk+sketch` adds `sketch`. The response records sit at the *predicting* positions, one for
    each response token, so that row i is the teacher's distribution over response token i.

    `shared_from` is the key of an earlier sample that is the same up to its last vision token:
    `views`, `vision`, `sketch` and the vision states of `hidden` are then those of that sample.
    The grids hold `response` and `hidden.predicting` by the share of vision tokens that is dropped.
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
    """One row of a shard: the sample and what the teacher said of it."""

    sample: Sample
    output: TeacherOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedSample(Strict):
    """A sample that the build could not use; counted and listed, never silently dropped."""

    key: str
    source_id: str
    reason: str
