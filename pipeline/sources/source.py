"""Opens sample sources: LLaVA JSON or JSON lines, WebDataset tars, Parquet in the hub's layout.

A source is a sequence of fixed length and order that reads one sample at a time. All kinds give
the same `Sample`, with any number of images. `scan` reads every sample once and names it by its
content, so that a build can be planned before the teacher runs. ValueError for an empty source or a
file that is not what its name says; `SampleError` for a sample that cannot be used.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from pipeline.config.build import SourceConfig
from pipeline.sources.llava_json import LlavaSource
from pipeline.sources.parquet import ParquetSource
from pipeline.sources.webdataset import TarSource
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.schema.samples import RejectedSample, Sample

NUM_LISTED = 20
"""How many bad samples an error lists."""


@runtime_checkable
class SampleSource(Protocol):
    """A sequence of samples; reading one may raise `SampleError`. Thread-safe."""

    @property
    def name(self) -> str:
        """What it was read from, for messages."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def open_source(config: SourceConfig) -> SampleSource:
    """Open the source; the end of `config.path` tells its kind.

    Raises ValueError for an unknown kind, a missing or malformed file, and an empty source.
    """
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"{config.path}: limit must be >= 1, found {config.limit}")
    source = _open(config)
    if not len(source):
        raise ValueError(f"{config.path}: holds no samples; check the path")
    if config.limit is not None and config.limit < len(source):
        return FirstSamples(source, config.limit)
    return source


@dataclass(frozen=True, slots=True, kw_only=True)
class ScannedSample:
    """A usable sample as `scan` found it: its key, its index in the source, its images.

    `images` is the digest of its images in order; None without images.
    """

    key: str
    index: int
    images: str | None


def scan(
    source: SampleSource, progress: Progress = no_progress
) -> tuple[list[ScannedSample], list[RejectedSample]]:
    """Read every sample once: the usable ones in order, and the rejected ones.

    Samples with equal content stay distinct: the second occurrence of a key gets the suffix "-1",
    the third "-2". A sample that could not be read has the key "index-<its position>".
    """
    found: list[ScannedSample] = []
    rejected: list[RejectedSample] = []
    seen: Counter[str] = Counter()
    for index in range(len(source)):
        try:
            sample = source[index]
        except SampleError as error:
            rejected.append(
                RejectedSample(key=f"index-{index}", source_id=error.sample_id, reason=error.reason)
            )
        else:
            suffix = f"-{seen[sample.key]}" if seen[sample.key] else ""
            seen[sample.key] += 1
            images = images_digest(sample.images)
            found.append(ScannedSample(key=sample.key + suffix, index=index, images=images))
        progress("scan", index + 1, len(source))
    return found, rejected


def refuse_samples(name: str, reasons: Sequence[str], remedy: str) -> None:
    """Raise ValueError with the first of these "<sample>: <reason>" lines, if there are any."""
    if not reasons:
        return
    lines = "".join(f"\n  {line}" for line in reasons[:NUM_LISTED])
    more = f"\n  ... and {len(reasons) - NUM_LISTED} more" if len(reasons) > NUM_LISTED else ""
    raise ValueError(f"{name}: {len(reasons)} samples cannot be used:{lines}{more}\n{remedy}")


def images_digest(images: Sequence[bytes]) -> str | None:
    """64 hex digits over the images in order; None without images."""
    each = [hashlib.sha256(image).hexdigest() for image in images]
    return hashlib.sha256(" ".join(each).encode()).hexdigest() if each else None


class FirstSamples:
    """The first samples of another source."""

    def __init__(self, source: SampleSource, num_samples: int) -> None:
        self.name = source.name
        self._source = source
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._num_samples:
            raise IndexError(index)
        return self._source[index]


def _open(config: SourceConfig) -> SampleSource:
    path = Path(config.path)
    if path.suffix in (".json", ".jsonl"):
        return LlavaSource(path, config.image_root)
    if config.image_root is not None:
        raise ValueError(
            f"{config.path}: image_root was given, but only .json and .jsonl sources name image "
            "files; omit it"
        )
    if path.suffix == ".tar":
        return TarSource(config.path)
    if path.suffix == ".parquet" or path.is_dir():
        return ParquetSource(path)
    found = "unknown kind of source" if path.exists() else "no such file or folder"
    raise ValueError(
        f"{config.path}: {found}; expected the name to end in .json, .jsonl, .tar or .parquet, or "
        "a folder of .parquet files"
    )
