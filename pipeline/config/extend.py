"""Declares the settings of `emkd extend`: what is added to a cache, and how it is computed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config.checks import MAX_PIXELS, refuse_changed, require_max_pixels
from teacher_cache.schema.options import RecordSettings
from teacher_cache.schema.strict_json import StrictRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendConfig(StrictRecord):
    """Add to a sealed cache, as a new one: samples of a source, or records of a further kind."""

    cache: str
    """The cache to extend: folder, or URL in an object store."""
    out: str
    """Folder or URL of the extended cache; the old one is not changed."""
    teacher: str
    """The teacher that the cache was built with; its content is compared."""
    source: str | None = None
    """New samples: those of this source that the cache lacks."""
    image_root: Path | None = None
    max_pixels: int = MAX_PIXELS
    confine_images: bool = False
    limit: int | None = None
    samples_per_shard: int | None = None
    """Samples of a new shard; default: as many as the cache's largest shard has."""
    on_bad_sample: Literal["refuse", "record"] = "refuse"
    settings: RecordSettings | None = None
    """Further records of the cache's samples, computed from the images that the cache holds."""
    device: str = "auto"
    torch_threads: int | None = None
    plugin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_max_pixels(self.max_pixels)
        records = None if self.settings is None else self.settings.records
        if (self.source is None) == (records is None):
            raise ValueError(
                "give either source, to add samples, or records, to add records of the samples "
                f"that are there; found source {self.source}, records {records}"
            )
        if self.settings is not None:
            names = ("image_root", "limit", "max_pixels", "confine_images")
            more = ("samples_per_shard", "on_bad_sample")
            refuse_changed(self, "records is given", *names, *more)
            if self.settings.grid is not None:
                raise ValueError("grid would have no effect: emkd extend adds no ratios")
