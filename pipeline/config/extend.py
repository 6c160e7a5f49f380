"""The settings of `emkd extend`: what is added to a cache, and how it is computed.

Settings of new records are those of `BuildConfig` under the same names, none of them set unless it
is given, so that one without effect can be refused. Imports nothing heavy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config.checks import refuse_changed
from teacher_cache.schema.options import AffinityDtype, HiddenDtype, LogitsCodec, RecordKind
from teacher_cache.schema.strict_json import StrictRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendConfig(StrictRecord):
    """Add to a sealed cache, as a new one: samples of a source, or records of a further kind."""

    cache: str
    """The cache to extend: folder, or URL in an object store."""
    out: str
    """Folder or URL of the extended cache; the one that is extended stays as it is."""
    teacher: str
    """The teacher that the cache was built with; its content is compared."""
    source: str | None = None
    """New samples: those of this source that the cache does not have."""
    image_root: Path | None = None
    limit: int | None = None
    samples_per_shard: int | None = None
    """Of the new shards; default: as many as the cache's largest has."""
    on_bad_sample: Literal["refuse", "record"] = "refuse"
    records: RecordKind | None = None
    """Further records of the samples that are there, from the images that the cache holds."""
    top_k: int | None = None
    """This one and those below are settings of new records, as emkd build has them; default: as
    emkd build's."""
    top_mass: float | None = None
    top_k_floor: int | None = None
    logits_codec: LogitsCodec | None = None
    logits_max_error: float | None = None
    affinity_dtype: AffinityDtype | None = None
    affinity_max_error: float | None = None
    sketch_rank: int | None = None
    calibration_tokens: int | None = None
    """Vision tokens of the cache to which a new sketch is fitted."""
    hidden_dtype: HiddenDtype | None = None
    hidden_group: int | None = None
    hidden_max_error: float | None = None
    device: str = "auto"
    torch_threads: int | None = None

    def __post_init__(self) -> None:
        if (self.source is None) == (self.records is None):
            raise ValueError(
                "give either source, to add samples, or records, to add records of the samples "
                f"that are there; found source {self.source}, records {self.records}"
            )
        if self.records is None:
            for names in RECORD_SETTINGS.values():
                refuse_changed(self, "source is given", *names)
        else:
            names = ("image_root", "limit", "samples_per_shard", "on_bad_sample")
            refuse_changed(self, "records is given", *names)


RECORD_SETTINGS = {
    "topk": (
        *("top_k", "top_mass", "top_k_floor", "logits_codec", "logits_max_error"),
        *("affinity_dtype", "affinity_max_error"),
    ),
    "sketch": ("sketch_rank", "calibration_tokens"),
    "hidden": ("hidden_dtype", "hidden_group", "hidden_max_error"),
}
"""Settings of `ExtendConfig` that a piece of the records needs where it is new."""
