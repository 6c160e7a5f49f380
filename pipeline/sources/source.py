"""Opens sample sources: JSON or JSON lines, WebDataset tars, Parquet; docs/data.md has each layout.

A source is a sequence of fixed length and order that reads one sample at a time. All kinds give
the same `Sample`, with any number of images. `scan` reads every sample once and names it by its
content, so that a build can be planned before the teacher runs. ValueError for an empty source or a
file that is not what its name says; `SampleError` for a sample that cannot be used.
"""

import bisect
import glob
import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from webdataset.shardlists import expand_urls

from pipeline.config.build import SourceConfig
from pipeline.sources.llava_json import METADATA_FILE, LlavaSource
from pipeline.sources.media import ImageRules
from pipeline.sources.parquet import ParquetSource
from pipeline.sources.webdataset import TarSource
from teacher_cache.schema.errors import SampleError, printable
from teacher_cache.schema.fingerprint import digest_json
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.schema.regular_file import require_regular
from teacher_cache.schema.samples import RejectedSample, Sample

logger = logging.getLogger(__name__)

NUM_LISTED = 20
"""How many bad samples an error lists."""


@runtime_checkable
class SampleSource(Protocol):
    """A sequence of samples; reading one may raise `SampleError`. Thread-safe."""

    @property
    def name(self) -> str:
        """What it was read from, for messages."""
        ...

    @property
    def unread(self) -> Counter[str]:
        """Fields and members that look like media and are not read, counted as samples are read."""
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

    `images` is the digest of its images in order; None without images. `answers` is the digest of
    what the source lists apart of its answers, which is no part of the key; None without any.
    """

    key: str
    index: int
    images: str | None
    answers: str | None = None


def scan(
    source: SampleSource, progress: Progress = no_progress, *, answered: bool = True
) -> tuple[list[ScannedSample], list[RejectedSample]]:
    """Read every sample once: the usable ones in order, and the rejected ones.

    With `answered`, a sample whose last question has no answer is rejected. Logs one warning that
    counts the fields which look like media and are not read.

    Samples with equal content stay distinct: the second occurrence of a key gets the suffix "-1",
    the third "-2". A sample that could not be read has the key "index-<its position>".
    """
    found: list[ScannedSample] = []
    rejected: list[RejectedSample] = []
    seen: Counter[str] = Counter()
    before = Counter(source.unread)
    for index in range(len(source)):
        try:
            sample = source[index]
            if answered and sample.messages[-1].role != "assistant":
                raise SampleError(
                    sample.source_id,
                    "its last question has no answer; only `emkd evaluate` takes such samples",
                )
        except SampleError as error:
            rejected.append(
                RejectedSample(key=f"index-{index}", source_id=error.sample_id, reason=error.reason)
            )
        else:
            suffix = f"-{seen[sample.key]}" if seen[sample.key] else ""
            seen[sample.key] += 1
            images = images_digest(sample.images)
            listed = [sample.references, sample.choices, sample.category]
            answers = digest_json(listed) if any(listed) else None
            key = sample.key + suffix
            found.append(ScannedSample(key=key, index=index, images=images, answers=answers))
        progress("scan", index + 1, len(source))
    warn_unread(source.name, source.unread - before)
    return found, rejected


def warn_unread(name: str, unread: Counter[str]) -> None:
    """Log what of a source looks like media and was not read, with counts; nothing for nothing."""
    if unread:
        counts = ", ".join(f"{field} ({count:,})" for field, count in sorted(unread.items()))
        text = printable(counts)
        logger.warning("%s: not read, though it looks like media: %s", name, text)


def refuse_samples(name: str, reasons: Sequence[str], remedy: str) -> None:
    """Raise ValueError with the first of these "<sample>: <reason>" lines, if there are any."""
    if not reasons:
        return
    lines = "".join(f"\n  {printable(line)}" for line in reasons[:NUM_LISTED])
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

    @property
    def unread(self) -> Counter[str]:
        """See `SampleSource`."""
        return self._source.unread

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._num_samples:
            raise IndexError(index)
        return self._source[index]


class JoinedSources:
    """The samples of several sources, one after the other."""

    def __init__(self, name: str, sources: Sequence[SampleSource]) -> None:
        self.name = name
        self._sources = sources
        self._starts = [0, *itertools.accumulate(map(len, sources))]

    @property
    def unread(self) -> Counter[str]:
        """See `SampleSource`."""
        return sum((source.unread for source in self._sources), Counter[str]())

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        number = bisect.bisect_right(self._starts, index) - 1
        return self._sources[number][index - self._starts[number]]


def _open(config: SourceConfig) -> SampleSource:
    files = source_files(config.path)
    endings = {file.suffix for file in files}
    rules = ImageRules(max_pixels=config.max_pixels, confined=config.confine_images)
    if endings <= {".json", ".jsonl"}:
        roots = [config.image_root or file.parent for file in files]
        of_files = [replace(rules, root=root) for root in roots]
        sources = [LlavaSource(*each) for each in zip(files, of_files, strict=True)]
        return sources[0] if len(sources) == 1 else JoinedSources(config.path, sources)
    if config.image_root is not None:
        raise ValueError(
            f"{config.path}: image_root was given, but only .json and .jsonl sources name image "
            "files; omit it"
        )
    if endings == {".tar"}:
        return TarSource(config.path, files, rules)
    if endings == {".parquet"}:
        return ParquetSource(config.path, files, rules)
    what = ", ".join(sorted(ending or "no ending" for ending in endings))
    raise ValueError(
        f"{config.path}: unknown kind of source: files that end in {what}; expected .json, .jsonl, "
        ".tar or .parquet, one kind in a source, or a folder of .parquet or .tar files"
    )


def source_files(path: str) -> list[Path]:
    """The files of a path, which may be a folder, a glob or a brace pattern, in order.

    A folder stands for its .parquet files, for those of its folder `data`, for its .tar files, or
    for its metadata.jsonl.
    ValueError where there is no such file.
    """
    files: list[Path] = []
    for piece in expand_urls(path):
        is_pattern = glob.has_magic(piece) and not Path(piece).exists()
        found = sorted(glob.glob(piece)) if is_pattern else [piece]
        for name in found:
            files += _folder_files(Path(name)) if Path(name).is_dir() else [Path(name)]
    missing = [file for file in files if not file.exists()]
    if missing or not files:
        found = missing[0] if missing else path
        raise ValueError(f"{found}: no such file or folder; check the path")
    for file in files:
        try:
            require_regular(file)
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    return files


def _folder_files(folder: Path) -> list[Path]:
    patterns = ("*.parquet", "data/*.parquet", "*.tar", METADATA_FILE)
    held = {p: files for p in patterns if (files := sorted(folder.glob(p)))}
    if len(held) > 1:
        raise ValueError(
            f"{folder}: holds {' and '.join(held)}; name one of them with the folder in front"
        )
    if not held:
        raise ValueError(
            f"{folder}: found no .parquet, no .tar and no {METADATA_FILE} in the folder; check the "
            "path, or name a .json file in it"
        )
    return next(iter(held.values()))
