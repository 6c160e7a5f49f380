"""Declares the settings of a cache's records and the names that they may take.

Imports nothing heavy, so that the command line can load it. Refuses values out of range.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal, get_args

from teacher_cache.schema.strict_json import StrictRecord

RecordKind = Literal["topk", "topk+sketch", "hidden", "topk+hidden", "topk+sketch+hidden"]
"""What a cache holds: the K largest logits, optionally a PCA sketch, the final hidden states, or
several of these."""

Piece = Literal["topk", "sketch", "hidden"]
"""What a record kind is made of."""

TierName = Literal["topk", "topk+sketch", "hidden"]
"""What a student can be trained from, least exact first."""

ShardFormatName = Literal["arrow", "webdataset"]

LogitsCodec = Literal["exact", "affine8"]
"""How top-k logits are stored: exactly, or as 8-bit codes between a position's smallest and largest
kept logit (both exact)."""

AffinityDtype = Literal["float32", "float16", "int8"]
"""How cosines are stored; int8: 8-bit codes between a text token's smallest and largest cosine."""

HiddenDtype = Literal["float32", "bfloat16", "int8"]
"""How hidden states are stored; int8: one scale per token and group of channels."""

TextSource = Literal["instruction", "released"]
"""Text that may decide which vision tokens a model drops: the user's text in the message with the
images, or all text after the images, answers included (EPIC's released code)."""

PictureRule = Literal["convert-rgb", "upright-on-white"]
"""How image bytes become the picture that models see: teacher_cache/encoding/pictures.py."""

PICTURE_RULE: PictureRule = "upright-on-white"
"""The rule that new caches are built with."""

EARLIER_PICTURE_RULE: PictureRule = "convert-rgb"
"""The rule of caches that were built before caches recorded it."""

TEXT_VERSION = 2
"""The version of `TextRules` that new caches are built with."""

MAX_RATIOS = 9
"""Most ratios of a grid: a ratio's columns are named by one digit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GridSettings(StrictRecord):
    """How a teacher drops its own vision tokens, to store one more response record per ratio.

    The ordinary response record (ratio 0) is always stored too.
    """

    compressor: str
    """A name in `student_train.compression.compressors.COMPRESSORS`."""
    layer: int
    """Decoder layer, counted from 0, at whose input vision tokens are dropped."""
    ratios: tuple[float, ...]
    """Shares of the vision tokens that are dropped, ascending, 0 < ratio < 1."""
    text: TextSource = "instruction"
    seed: int = 0
    """Seed of compressors that draw random numbers (random)."""

    def __post_init__(self) -> None:
        require_ratios(self.ratios)
        if self.layer < 1:
            raise ValueError(
                f"the layer is {self.layer}, expected at least 1: the layer before it decides what "
                "is kept"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules(StrictRecord):
    """How the messages of a sample become tokens; docs/families.md has the rules.

    Version 1 is that of caches without this record: no end of turn is appended, text may spell
    control tokens, and a tokenizer may truncate.
    """

    version: int = TEXT_VERSION
    append_eos: bool = True
    """Append the tokenizer's end-of-sequence token to assistant turns that the template does not
    end. In a cache: whether the template needed it."""
    template: str | None = None
    """Text of the chat template that replaced the checkpoint's; None: the checkpoint's own."""


EARLIER_TEXT_RULES = TextRules(version=1, append_eos=False)
"""The rules of caches that were built before caches recorded them."""


def require_ratios(ratios: tuple[float, ...]) -> None:
    """Raise ValueError for ratios that are too many, outside (0, 1), or not ascending."""
    if not 1 <= len(ratios) <= MAX_RATIOS:
        raise ValueError(f"found {len(ratios)} ratios, expected 1 to {MAX_RATIOS}")
    if not all(0 < ratio < 1 for ratio in ratios):
        raise ValueError(
            f"ratios are {ratios}, expected numbers between 0 and 1, both excluded: 0.75 drops "
            "three quarters of the vision tokens; ratio 0 is always stored"
        )
    if any(low >= high for low, high in pairwise(ratios)):
        raise ValueError(f"ratios are {ratios}, expected ascending and distinct")


def holds(records: RecordKind, piece: Piece) -> bool:
    """Whether records of this kind have the piece."""
    return piece in records.split("+")


_TOP_K: dict[str, tuple[Piece, ...]] = {"pieces": ("topk",)}
_SKETCH: dict[str, tuple[Piece, ...]] = {"pieces": ("sketch",)}
_HIDDEN: dict[str, tuple[Piece, ...]] = {"pieces": ("hidden",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSettings(StrictRecord):
    """What is stored of the teacher, and how exactly.

    Bounds (`..._max_error`) are promises: the build stops at a sample that exceeds one.
    A setting that the records do not use has no effect; `refuse_unused` raises where it was
    changed. `CacheSpec` stores these settings, and None for those that are not used.
    """

    records: RecordKind = "topk+sketch"
    """What is stored of the teacher's outputs."""
    top_k: int = field(default=64, metadata=_TOP_K)
    """Largest logits kept per position; with top_p, the maximum."""
    top_p: float | None = field(default=None, metadata=_TOP_K)
    """Keep the fewest entries per position whose probabilities sum to this value, for example
    0.95; None keeps top_k everywhere."""
    min_k: int = field(default=8, metadata=_TOP_K)
    """Fewest entries kept per position, with top_p."""
    logits_codec: LogitsCodec = field(default="exact", metadata=_TOP_K)
    """`affine8`: 8-bit codes between a position's smallest and largest kept logit; saves space
    where the teacher computes in float32."""
    logits_max_error: float = field(default=0.05, metadata=_TOP_K)
    """Largest error of an affine8 logit; a sample that exceeds it stops the build, and the error
    says what to choose instead. The other bounds work alike."""
    least_logits: bool = field(default=True, metadata=_TOP_K)
    """Store each position's smallest log-probability (2 bytes): it bounds a reverse KL from
    above."""
    sketch_rank: int = field(default=128, metadata=_SKETCH)
    """Directions of the PCA sketch; capped at the teacher's width, where only rounding to int8 is
    lost."""
    calibration_tokens: int = field(default=20_000, metadata={"pieces": ("topk", "sketch")})
    """Vision tokens, from samples spread over the whole source, to which the sketch's basis and
    the tail template are fitted; all of them where the source has fewer. With fewer, or with few
    distinct images, the basis lacks directions of other images (docs/method.md)."""
    hidden_dtype: HiddenDtype = field(default="bfloat16", metadata=_HIDDEN)
    """How hidden states are stored."""
    hidden_group: int | None = field(default=64, metadata=_HIDDEN)
    """Most channels that share a scale where states are int8; None: one scale per token."""
    hidden_max_error: float = field(default=0.02, metadata=_HIDDEN)
    """Largest error of an int8 state, as a share of the state's norm."""
    affinity_dtype: AffinityDtype = field(default="float16", metadata=_TOP_K)
    """How cosines of VLAD are stored."""
    affinity_max_error: float = field(default=0.002, metadata=_TOP_K)
    """Largest error of an int8 cosine."""
    grid: GridSettings | None = None
    """Store the response at further ratios of dropped vision tokens; None: at ratio 0 only."""

    def __post_init__(self) -> None:
        for name, known in (("hidden_dtype", HiddenDtype), ("affinity_dtype", AffinityDtype)):
            if getattr(self, name) not in get_args(known):
                expected = ", ".join(get_args(known))
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {expected}")
        for name in ("logits_max_error", "hidden_max_error", "affinity_max_error"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, expected a finite bound >= 0")
        for name in ("top_k", "min_k", "sketch_rank", "calibration_tokens", "hidden_group"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, found {value}")
        if self.top_p is not None:
            require_cut(self.top_k, self.top_p, self.min_k)

    @property
    def unused(self) -> Mapping[str, str]:
        """By name of a setting that these records do not use: why not."""
        reasons = {
            "min_k": (self.top_p is not None, "top_p is not set"),
            "logits_max_error": (self.logits_codec == "affine8", "logits are exact"),
            "affinity_max_error": (self.affinity_dtype == "int8", "cosines are not int8"),
            "hidden_group": (self.hidden_dtype == "int8", "hidden states are not int8"),
            "hidden_max_error": (self.hidden_dtype == "int8", "hidden states are not int8"),
        }
        unused = {name: reason for name, (used, reason) in reasons.items() if not used}
        for name, pieces in SETTING_PIECES.items():
            if not any(holds(self.records, piece) for piece in pieces):
                unused[name] = f"records {self.records} have no {' or '.join(pieces)}"
        return unused

    @property
    def changed(self) -> Mapping[str, Any]:
        """The settings of some piece that differ from their defaults, by name."""
        of_pieces = [each for each in fields(self) if each.name in SETTING_PIECES]
        values = {each.name: getattr(self, each.name) for each in of_pieces}
        return {e.name: values[e.name] for e in of_pieces if values[e.name] != e.default}

    def for_spec(self) -> dict[str, Any]:
        """The fields of a `CacheSpec` that are settings; None for those that are not used."""
        unused = self.unused.keys() - {"least_logits"}
        spec = {each.name: getattr(self, each.name) for each in fields(self)}
        del spec["calibration_tokens"]  # the spec has the digest of what was fitted to them
        spec["least_logits"] &= holds(self.records, "topk")
        return spec | dict.fromkeys(unused & spec.keys())

    def refuse_unused(self) -> None:
        """Raise ValueError for a setting that was changed and that these records do not use."""
        for name in self.changed:
            if name in self.unused:
                raise ValueError(f"{name} would have no effect: {self.unused[name]}")


SETTING_PIECES: Mapping[str, tuple[Piece, ...]] = {
    each.name: each.metadata["pieces"] for each in fields(RecordSettings) if each.metadata
}
"""By name of a record setting: the pieces that use it."""


def tier_to_learn_from(held: RecordKind, wanted: TierName | None) -> TierName:
    """The tier wanted of a cache, or the most exact one that it holds; ValueError where absent."""
    tiers: tuple[TierName, ...] = ("hidden", "topk+sketch", "topk")
    found: list[TierName] = [tier for tier in tiers if set(tier.split("+")) <= set(held.split("+"))]
    if wanted is not None and wanted not in found:
        raise ValueError(
            f"the cache holds {held}, which has no {wanted} records; train from "
            f"{' or '.join(found)}, or add them by emkd extend"
        )
    return wanted or found[0]


def require_cut(top_k: int, top_p: float, min_k: int) -> None:
    """Raise ValueError unless a cut at probability `top_p` can keep min_k..top_k entries."""
    if not 0 < top_p < 1:
        raise ValueError(
            f"top_p is {top_p}, expected a probability between 0 and 1, both excluded; omit it to "
            "keep top_k entries at every position"
        )
    if not 1 <= min_k <= top_k:
        raise ValueError(f"min_k is {min_k}, expected 1..top_k, which is {top_k}")
