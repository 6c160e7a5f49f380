"""The settings of build, and of the source of its samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config.checks import (
    CALIBRATION_TOKENS,
    QUALITY_SAMPLES,
    Dtype,
    at_least_one,
    refuse_changed,
    refuse_idle_choice,
)
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
from teacher_cache.schema.strict_json import StrictRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig(StrictRecord):
    """Where samples come from: LLaVA JSON, WebDataset tars or Parquet, told by the path's end."""

    path: str
    """A .json / .jsonl file, a .tar (or a brace pattern such as data/{000..009}.tar), or a
    .parquet file or folder."""
    image_root: Path | None = None
    """Folder that image paths of a LLaVA JSON are relative to; default: the file's own folder."""
    limit: int | None = None
    """Read the first samples only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig(StrictRecord):
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
