"""The settings of `emkd plan`: counts to compute with, or a pilot that measures them.

Refuses a setting that would have no effect with, or without, a pilot. Imports nothing heavy.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from pipeline.config.checks import (
    MAX_PIXELS,
    Dtype,
    at_least_one,
    refuse_changed,
    require_max_pixels,
)
from teacher_cache.schema.options import AffinityDtype, LogitsCodec, require_ratios
from teacher_cache.schema.strict_json import StrictRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig(StrictRecord):
    """Bytes and time of a cache: arithmetic from counts, or, with `pilot`, measured on samples."""

    samples: int | None = None
    """Samples of the whole cache; default: the paper's 779,000, or with --pilot all of the
    source."""
    images_per_sample: float = 1.0
    """Mean number of images of a sample."""
    samples_per_image: float | None = None
    """Mean number of samples with the same images and the same prompt before them: they share one
    vision record. Default: 1, or with --pilot as found among its samples."""
    vision_tokens: int = 576
    """Vision tokens of one view of an image."""
    views: int = 1
    """Views (base view, tiles) of one image."""
    text_tokens: int = 128
    """Tokens of a sample's own text, instructions and responses."""
    response_tokens: int = 64
    """How many of `text_tokens` are responses."""
    vocab_size: int = 32000
    """Vocabulary of the teacher."""
    hidden_size: int = 4096
    """Width of the teacher's hidden states."""
    logits_codec: LogitsCodec = "exact"
    """How top-k logits are stored."""
    affinity_dtype: AffinityDtype = "float16"
    """How cosines of VLAD are stored."""
    mean_kept: float | None = None
    """Entries that a position keeps on average, for a cache with --top-p."""
    ratios: tuple[float, ...] = ()
    """Ratios of a response grid; each adds one record to every response token."""
    image_bytes: int = 100_000
    """Bytes of one encoded image; caches hold the images too."""
    teacher_seconds_per_sample: float | None = None
    """Accelerator seconds; --pilot measures them where they are not given."""
    online_teacher_seconds_per_step: float | None = None
    """What a live teacher would add to each step of a student: gives the number of student runs
    from which on the cache is cheaper."""
    steps_per_run: int | None = None
    """Steps of one student run, for the same purpose."""
    pilot: int = 0
    """Run the teacher on this many samples from the start of the source, measure what each tier
    would lose, and recommend one; 0: arithmetic alone, no model."""
    source: str | None = None
    """Source of the pilot's samples."""
    image_root: Path | None = None
    max_pixels: int = MAX_PIXELS
    confine_images: bool = False
    teacher: str | None = None
    """Teacher of the pilot: folder or hub id."""
    chat_template: Path | None = None
    """File with a chat template that replaces the teacher's own, for --pilot."""
    append_eos: bool = True
    """As in a build: end assistant turns that the chat template does not end, for --pilot."""
    match_metric: Literal["raw_l1", "prob_l1"] = "raw_l1"
    """Matching that the cache must serve: by raw logits (the paper's) or probabilities."""
    batch_size: int = 8
    device: str = "auto"
    dtype: Dtype | None = None
    """Dtype of the teacher and so of its logits; default: bfloat16, with --pilot the
    checkpoint's own."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    plugin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least_one(self, "vision_tokens", "views", "vocab_size", "hidden_size", "batch_size")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not 0 <= value < float("inf"):
                raise ValueError(f"{field.name} must be >= 0 and finite, found {value}")
        if self.ratios:
            require_ratios(self.ratios)
        require_max_pixels(self.max_pixels)
        if self.samples is not None:
            at_least_one(self, "samples")
        if self.mean_kept is not None and self.mean_kept < 1:
            raise ValueError(f"mean_kept must be >= 1, found {self.mean_kept}")
        if self.samples_per_image is not None and self.samples_per_image < 1:
            raise ValueError(f"samples_per_image must be >= 1, found {self.samples_per_image}")
        if self.response_tokens > self.text_tokens:
            raise ValueError(
                f"response_tokens is {self.response_tokens}, but text_tokens, which counts the "
                f"responses too, is {self.text_tokens}"
            )
        if (self.online_teacher_seconds_per_step is None) != (self.steps_per_run is None):
            raise ValueError(
                "the break-even needs both online_teacher_seconds_per_step and steps_per_run"
            )
        if self.pilot:
            self._require_pilot()
        else:
            of_pilot = ("source", "image_root", "max_pixels", "confine_images", "teacher")
            more = ("chat_template", "append_eos", "match_metric", "batch_size", "device")
            refuse_changed(self, "pilot is 0", *of_pilot, *more, "attention", "plugin")

    def _require_pilot(self) -> None:
        if self.pilot < 2 or self.source is None or self.teacher is None:
            raise ValueError(
                "a pilot needs source, teacher and at least 2 samples (one half fits the sketch, "
                f"the other is measured); found pilot {self.pilot}, source {self.source}, "
                f"teacher {self.teacher}"
            )
        counts = ("images_per_sample", "vision_tokens", "views", "text_tokens", "response_tokens")
        more = ("vocab_size", "hidden_size", "image_bytes", "mean_kept")
        refuse_changed(self, "the pilot counts it", *counts, *more)
        refuse_changed(self, "a pilot compares exact ones", "logits_codec", "affinity_dtype")
        refuse_changed(self, "a pilot compares caches without a grid", "ratios")
