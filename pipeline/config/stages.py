"""The settings of every stage, as frozen dataclasses; flags, help and `--config` files follow.

Two kinds live side by side: what changes the stored numbers (it ends up in the cache's
`CacheSpec` or the run's objective) and how the work is carried out (workers, batch sizes of a
loader, devices). Imports nothing heavy, so that `emkd --help` answers at once.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from student_train.config.compression import CompressionSettings, Stage
from student_train.config.recipe import TrainerSettings
from teacher_cache.schema.options import (
    AffinityDtype,
    GridSettings,
    HiddenDtype,
    LogitsCodec,
    RecordKind,
    ShardFormatName,
    TextSource,
    holds,
    require_cut,
)
from teacher_cache.schema.strict_json import Strict

Dtype = Literal["float32", "bfloat16", "float16"]
DigitQuestions = Literal["cells", "rows"]
ScoreName = Literal["exact_match", "word_accuracy", "vqa_accuracy", "anls", "relaxed_accuracy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitsConfig(Strict):
    """Write the demo's data: grids of scikit-learn's handwritten digits, as LLaVA JSON."""

    out: Path
    num_train: int = 4096
    num_heldout: int = 512
    questions: DigitQuestions = "cells"
    """Eight named cells behind the image, or one row named before it (of emkd demo --epic)."""
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one(self, "num_train", "num_heldout")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, found {self.seed}")


CALIBRATION_TOKENS = 20_000
"""Vision tokens that fit a sketch's basis: fewer, or of a few alike images, and directions of the
next image are missing (docs/method.md)."""

QUALITY_SAMPLES = 2
"""Samples of a shard on which a build measures what its records lose, unless told otherwise."""


def at_least_one(record: object, *names: str) -> None:
    """Raise ValueError for the first of the named counts that is below 1."""
    for name in names:
        if getattr(record, name) < 1:
            raise ValueError(f"{name} must be >= 1, found {getattr(record, name)}")


def refuse_changed(record: Any, why: str, *names: str) -> None:
    """Raise ValueError for a setting that was changed and would not be looked at."""
    for field in fields(record):
        if field.name in names and getattr(record, field.name) != field.default:
            raise ValueError(f"{field.name} would have no effect: {why}")


def refuse_idle_choice(record: Any, compressor: str) -> None:
    """Raise ValueError for the seed of a compressor that draws nothing, or text for one that does.

    What a compressor that was registered looks at, nobody knows here.
    """
    if compressor in ("dart", "fastv"):
        refuse_changed(record, f"the compressor {compressor} draws nothing", "compress_seed")
    if compressor == "random":
        refuse_changed(record, "the compressor random looks at no text", "compress_text")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig(Strict):
    """Where samples come from: LLaVA JSON, WebDataset tars or Parquet, told by the path's end."""

    path: str
    """A .json / .jsonl file, a .tar (or a brace pattern such as data/{000..009}.tar), or a
    .parquet file or folder."""
    image_root: Path | None = None
    """Folder that image paths of a LLaVA JSON are relative to; default: the file's own folder."""
    limit: int | None = None
    """Read the first samples only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig(Strict):
    """Run the teacher once over a source and write a cache of its outputs."""

    source: SourceConfig
    teacher: str
    """Local path or hub id of any image-text-to-text model of transformers."""
    out: str
    """Folder of the cache, or a URL in an object store: s3://bucket/prefix."""
    format: ShardFormatName = "arrow"
    records: RecordKind = "topk+sketch"
    top_k: int = 64
    """Largest logits that a position keeps; with --top-mass the most of them."""
    top_mass: float | None = None
    """Let each position keep as few entries as hold this probability, say 0.95."""
    top_k_floor: int = 8
    """Fewest entries of a position, with --top-mass."""
    logits_codec: LogitsCodec = "exact"
    """`affine8`: 8-bit codes between a position's smallest and largest kept logit; pays where the
    teacher computes in float32."""
    logits_max_error: float = 0.05
    """Promise of affine8, and of the other codecs below: a sample that loses more stops the build,
    which then says what to choose instead."""
    least_logits: bool = True
    """Keep each position's smallest log-probability, 2 bytes: it bounds a reverse KL from above."""
    sketch_rank: int = 128
    """Directions of the PCA sketch; capped at the teacher's width, where it is lossless but for
    the rounding to int8."""
    calibration_tokens: int = CALIBRATION_TOKENS
    """Vision tokens, of samples spread over the whole source, to which the sketch's basis and the
    template of the tails are fitted; all there are where the source has fewer."""
    hidden_dtype: HiddenDtype = "bfloat16"
    hidden_group: int | None = 64
    """Most channels that share a scale where states are int8; none: all of a token's."""
    hidden_max_error: float = 0.02
    """Of int8 states, as a share of a state's length."""
    affinity_dtype: AffinityDtype = "float16"
    affinity_max_error: float = 0.002
    """Of int8 cosines."""
    compressor: str | None = None
    """With --ratios: what the teacher drops its own vision tokens by (dart, fastv, random)."""
    ratios: tuple[float, ...] = ()
    """Also store what the teacher says of the response without these shares of its vision tokens,
    say 0.25 0.5 0.75, for students of epic-cached-*."""
    compress_layer: int = 2
    """Decoder layer, counted from 0, at whose input they are dropped."""
    compress_text: TextSource = "instruction"
    """Text that decides which ones are kept; `released`: answers too, as in EPIC's code."""
    compress_seed: int = 0
    """Of the compressor random."""
    system_prompt: str | None = None
    samples_per_shard: int = 256
    share_vision: bool = True
    """Store the samples of one image next to each other, and what the teacher says at its vision
    tokens once where the prompts are the same up to there."""
    batch_size: int = 8
    """Samples of one forward pass of the teacher."""
    device: str = "auto"
    """`auto` takes CUDA where it is available."""
    dtype: Dtype | None = None
    """Compute dtype; default: the checkpoint's own."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    on_bad_sample: Literal["refuse", "record"] = "refuse"
    """`refuse` stops before the cache is sealed and names the samples; `record` goes on, and
    lists them in plan, commit records and seal."""
    quality_samples: int = QUALITY_SAMPLES
    """Samples of each shard on which what the records lose is measured, against every logit; 0:
    nothing is measured, tail masses neither."""
    require_quality: bool = False
    """Exit with code 4 where the records miss their stated quality, or where it is not known."""
    torch_threads: int | None = None
    """CPU threads of torch in each worker; default: torch's own choice."""

    def __post_init__(self) -> None:
        at_least_one(self, "top_k", "sketch_rank", "calibration_tokens", "samples_per_shard")
        at_least_one(self, "batch_size", "top_k_floor")
        if self.quality_samples < 0:
            raise ValueError(f"quality_samples must be >= 0, found {self.quality_samples}")
        if self.require_quality and not self.quality_samples:
            raise ValueError("require_quality needs quality_samples: with 0 nothing is measured")
        if self.hidden_group is not None:
            at_least_one(self, "hidden_group")
        if self.top_mass is not None:
            require_cut(self.top_k, self.top_mass, self.top_k_floor)
        if (self.compressor is None) != (not self.ratios):
            raise ValueError(
                f"a grid needs both compressor and ratios; found compressor {self.compressor}, "
                f"ratios {self.ratios}"
            )
        self._refuse_idle()

    @property
    def grid(self) -> GridSettings | None:
        """The grid of ratios, None without one; ValueError for ratios that make no grid."""
        if self.compressor is None:
            return None
        return GridSettings(
            compressor=self.compressor,
            layer=self.compress_layer,
            ratios=self.ratios,
            text=self.compress_text,
            seed=self.compress_seed,
        )

    def _refuse_idle(self) -> None:
        """Raise ValueError for a setting that these records or codecs have no use for."""
        top, hidden = holds(self.records, "topk"), holds(self.records, "hidden")
        sketch = holds(self.records, "sketch")
        use = {
            f"records {self.records} have no logits": (top, "top_k", "top_mass", "logits_codec"),
            f"records {self.records} have no sketch": (sketch, "sketch_rank"),
            f"records {self.records} keep every entry": (top, "calibration_tokens", "least_logits"),
            f"records {self.records} have no cosines": (top, "affinity_dtype"),
            f"records {self.records} have no hidden states": (hidden, "hidden_dtype"),
            "no ratios are given": (
                self.grid is not None,
                *("compress_layer", "compress_text", "compress_seed"),
            ),
            f"records {self.records} keep every logit": (top, "quality_samples"),
            "top_mass is not set": (self.top_mass is not None, "top_k_floor"),
            "logits are exact": (self.logits_codec == "affine8", "logits_max_error"),
            "cosines are not int8": (self.affinity_dtype == "int8", "affinity_max_error"),
            "hidden states are not int8": (
                self.hidden_dtype == "int8",
                *("hidden_group", "hidden_max_error"),
            ),
        }
        for why, (used, *names) in use.items():
            if not used:
                refuse_changed(self, why, *names)
        if self.compressor is not None:
            refuse_idle_choice(self, self.compressor)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(TrainerSettings):
    """Train one student from a sealed cache; no teacher is loaded."""

    cache: str
    """Folder or URL of a sealed cache."""
    student: str
    """A vanilla model (the projector below is put into it) or a student written by `emkd train`."""
    out: Path
    projector: Literal["avgpool", "none"] = "avgpool"
    """`avgpool` pools the vision tokens (LLaVA, LLaVA-NeXT); `none` leaves a model of any family
    as it is, so that a schedule can drop tokens inside its language model."""
    stride: int = 2
    """Vision tokens are pooled by stride x stride."""
    expect_cache: str | None = None
    """Refuse a cache whose fingerprint does not begin with this."""
    torch_threads: int | None = None
    """CPU threads of torch; fix it where bits must repeat on other machines."""

    def __post_init__(self) -> None:
        TrainerSettings.__post_init__(self)
        if self.projector == "none":
            refuse_changed(self, "projector none does not pool", "stride")

    @property
    def settings(self) -> TrainerSettings:
        """The trainer's share of the settings, without paths."""
        return TrainerSettings(**{f.name: getattr(self, f.name) for f in fields(TrainerSettings)})


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig(Strict):
    """Generate answers for a source and score them against the last assistant turn."""

    model: str
    source: SourceConfig
    out: Path
    scores: tuple[ScoreName, ...] = ("exact_match", "word_accuracy")
    batch_size: int = 16
    max_new_tokens: int = 64
    device: str = "auto"
    dtype: Dtype | None = None
    system_prompt: str | None = None
    cache: str | None = None
    """A cache (folder or URL) of the same source: draws, for its first samples, whom each student
    token is matched to and what the teacher's vision tokens say."""
    num_pictures: int = 4
    compressor: str | None = None
    """Drop vision tokens inside the language model: dart, fastv, random, or one that was
    registered; none: all of them go through every layer."""
    compress_layer: int = 2
    """Decoder layer, counted from 0, at whose input they go."""
    ratio: float | None = None
    """Share of them that is dropped there."""
    stages: tuple[str, ...] = ()
    """Instead of layer and ratio, a pyramid: 8:0.5 16:0.5 drops half at the input of layer 8 and
    half of what is left at that of layer 16."""
    compress_text: TextSource = "instruction"
    """Text that decides: the turn's instruction, or released, all text behind the images."""
    compress_seed: int = 0
    """Of compressors that draw (random)."""
    torch_threads: int | None = None

    def __post_init__(self) -> None:
        at_least_one(self, "batch_size", "max_new_tokens")
        if not self.scores:
            raise ValueError("scores is empty; name at least one")
        if self.compressor is None:
            names = ("compress_layer", "ratio", "stages", "compress_text", "compress_seed")
            refuse_changed(self, "compressor is not set", *names)
            return
        if self.cache is not None:
            raise ValueError(
                "cache and compressor are both set, but pictures show the vision tokens before any "
                "are dropped; draw them in the evaluation without compressor"
            )
        if (self.ratio is None) != bool(self.stages):
            raise ValueError(
                f"compressor {self.compressor!r} needs a ratio (0.75 keeps a quarter of the vision "
                f"tokens) or stages, one of them; found ratio {self.ratio} and stages {self.stages}"
            )
        refuse_idle_choice(self, self.compressor)
        if self.stages:
            refuse_changed(self, "stages name their layers", "compress_layer")
        _ = self.compression

    @property
    def compression(self) -> CompressionSettings | None:
        """What is dropped inside the language model; ValueError for stages that mean nothing."""
        if self.compressor is None:
            return None
        pairs = self.stages or (f"{self.compress_layer}:{self.ratio}",)
        return CompressionSettings(
            compressor=self.compressor,
            stages=tuple(_stage(pair) for pair in pairs),
            text=self.compress_text,
            seed=self.compress_seed,
        )


def _stage(pair: str) -> Stage:
    layer, _, ratio = pair.partition(":")
    try:
        number, share = int(layer), float(ratio)
    except ValueError:
        raise ValueError(
            f"found the stage {pair!r}, expected LAYER:RATIO such as 8:0.5, half at layer 8"
        ) from None
    return Stage(layer=number, ratio=share)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig(Strict):
    """Compare runs in one self-contained HTML page."""

    runs: tuple[Path, ...]
    out: Path = Path("report.html")
