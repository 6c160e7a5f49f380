"""Declares the settings of build, and of the source of its samples."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config.checks import (
    MAX_PIXELS,
    URL,
    Dtype,
    at_least_one,
    refuse_idle_choice,
    refuse_url_paths,
    require_max_pixels,
)
from teacher_cache.schema.options import RecordSettings, ShardFormatName
from teacher_cache.schema.strict_json import StrictRecord

QUALITY_SAMPLES = 2
"""Samples of a shard on which a build measures, by default, what its records lose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig(StrictRecord):
    """Where samples come from. The path's end decides: LLaVA JSON, WebDataset tars or Parquet."""

    path: str
    """LLaVA JSON (.json, .jsonl), WebDataset (.tar, or a brace pattern such as
    data/{000..009}.tar), or Parquet (file or folder)."""
    image_root: Path | None = None
    """Folder that the image paths of a LLaVA JSON are relative to; default: the file's folder."""
    limit: int | None = None
    """Read only this many samples, from the first on."""
    max_pixels: int = MAX_PIXELS
    """Most pixels of an image; a sample with a larger one is refused before it is decoded."""
    confine_images: bool = False
    """Refuse image paths that lead out of the image root, by `..`, a link, or from `/`: for sources
    that you do not trust."""

    def __post_init__(self) -> None:
        refuse_url_paths(self)
        require_max_pixels(self.max_pixels)
        if re.match(URL, self.path):
            raise ValueError(
                f"{self.path}: sources are read from files, not from URLs; download it or mount "
                "the store"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig(StrictRecord):
    """Run the teacher once over a source and write a cache of its outputs."""

    source: SourceConfig
    teacher: str
    """Folder or hub id of an image-text-to-text model of transformers."""
    out: str
    """Folder of the cache, or a URL in an object store: s3://bucket/prefix."""
    format: ShardFormatName = "arrow"
    settings: RecordSettings = RecordSettings()
    system_prompt: str | None = None
    chat_template: Path | None = None
    """File with a chat template that replaces the teacher's own; the cache keeps its text."""
    append_eos: bool = True
    """Append the tokenizer's end-of-sequence token to every assistant turn that the chat template
    does not end, so that students learn to stop."""
    samples_per_shard: int = 256
    """Samples of one shard, the unit of work, retry and reading."""
    share_vision: bool = True
    """Store samples of one image next to each other, and share the teacher's vision records
    between samples whose prompts are equal up to the last vision token."""
    batch_size: int = 8
    """Samples of one forward pass of the teacher."""
    device: str = "auto"
    """`auto` takes CUDA where it is available."""
    dtype: Dtype | None = None
    """Compute dtype; default: the checkpoint's."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    on_bad_sample: Literal["refuse", "record"] = "refuse"
    """`refuse` stops before the cache is sealed and names the samples; `record` leaves them out
    and lists them in plan, commit records and seal."""
    quality_samples: int = QUALITY_SAMPLES
    """Samples of each shard on which the loss of the records is measured against every logit; 0
    disables all measurement, that of the mass outside the kept entries too."""
    require_quality: bool = False
    """Exit with code 4 where the records miss their stated quality, or where it is unknown."""
    plugin: tuple[str, ...] = ()
    """Modules of yours to import first (`package.module`; repeatable): they register geometries,
    compressors or classes of transformers. docs/families.md has an example."""
    torch_threads: int | None = None
    """CPU threads of torch in each worker; default: torch's own choice."""

    def __post_init__(self) -> None:
        at_least_one(self, "samples_per_shard", "batch_size")
        if self.quality_samples < 0:
            raise ValueError(f"quality_samples must be >= 0, found {self.quality_samples}")
        if self.require_quality and not self.quality_samples:
            raise ValueError("require_quality needs quality_samples: with 0 nothing is measured")
        self.settings.refuse_unused()
        if self.settings.records == "hidden" and self.quality_samples != QUALITY_SAMPLES:
            raise ValueError("quality_samples would have no effect: records hidden lose no logit")
        if self.settings.grid is not None:
            refuse_idle_choice(self.settings.grid, self.settings.grid.compressor)

    def with_settings(self, **changes: Any) -> "BuildConfig":
        """The same build with some of its record settings changed."""
        return replace(self, settings=replace(self.settings, **changes))
