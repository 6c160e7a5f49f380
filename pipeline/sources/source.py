"""Where samples come from: LLaVA JSON or JSON lines, WebDataset tars, Parquet in the hub layout.

Promises: a source is a sequence of fixed length and order that reads one sample at a time; all
kinds give the same `Sample`, with one, several or no images. `scan` reads every sample once and
names each by its content, so that a build can be planned before any teacher work. Refuses an
empty source and a file that is not what its name says (ValueError); a sample that cannot be used
is a `SampleError`, which `scan` lists instead of stopping at the first.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pipeline.config.stages import SourceConfig
from pipeline.sources.conversations import build_sample, entry_id
from pipeline.sources.parquet import ParquetSource
from pipeline.sources.webdataset import TarSource
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.samples import RejectedSample, Sample


@runtime_checkable
class SampleSource(Protocol):
    """A sequence of samples; reading one may raise `SampleError`. Safe to use from threads."""

    @property
    def name(self) -> str:
        """What it was read from, for people."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def open_source(config: SourceConfig) -> SampleSource:
    """Open the source that the end of `config.path` tells of.

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
    """What `scan` notes of a usable sample: its key, where it is, which images it shows.

    `images` is the digest of its images in order; None where it has none.
    """

    key: str
    index: int
    images: str | None


def scan(
    source: SampleSource, progress: Callable[[int, int], None] | None = None
) -> tuple[list[ScannedSample], list[RejectedSample]]:
    """Read every sample once: the usable ones in order, and the rejected ones.

    Samples with the same content stay apart: the second occurrence of a key gets the suffix "-1",
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
        if progress is not None:
            progress(index + 1, len(source))
    return found, rejected


def images_digest(images: Sequence[bytes]) -> str | None:
    """64 hex digits over images in their order; None for none."""
    each = [hashlib.sha256(image).hexdigest() for image in images]
    return hashlib.sha256(" ".join(each).encode()).hexdigest() if each else None


class FirstSamples:
    """The first samples of another source."""

    def __init__(self, source: SampleSource, num_samples: int) -> None:
        self._source = source
        self._num_samples = num_samples

    @property
    def name(self) -> str:
        """What it was read from, for people."""
        return self._source.name

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._num_samples:
            raise IndexError(index)
        return self._source[index]


class LlavaSource:
    """LLaVA's training files: one JSON list, or one JSON object per line (.jsonl).

    An entry has `conversations`, optionally `id`, and optionally `image`: a path or a list of
    paths relative to `image_root`. Other fields are not read.
    """

    def __init__(self, path: Path, image_root: Path | None) -> None:
        self._path = path
        self._root = path.parent if image_root is None else image_root
        data = _read_file(path)
        if path.suffix == ".jsonl":
            lines = enumerate(data.split(b"\n"), start=1)
            # Lines are decoded when their sample is read: a broken one rejects that sample only.
            self._entries: Sequence[Any] = [(n, line) for n, line in lines if line.strip()]
        else:
            self._entries = _json_list(path, data)

    @property
    def name(self) -> str:
        """The file."""
        return str(self._path)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        entry, where = self._entries[index], f"{self._path}, entry {index}"
        source_id = f"{self._path.name}:{index}"
        if self._path.suffix == ".jsonl":
            number, line = entry
            where = f"{self._path}, line {number}"
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise SampleError(source_id, f"{where}: not valid JSON: {error}") from error
        if not isinstance(entry, dict):
            found = type(entry).__name__
            raise SampleError(source_id, f"{where}: expected a JSON object, found {found}")
        source_id = entry_id(entry, source_id)
        images = [self._image(path, where, source_id) for path in _paths(entry.get("image"))]
        return build_sample(where, source_id, images, entry)

    def _image(self, path: Any, where: str, source_id: str) -> bytes:
        if not isinstance(path, str):
            raise SampleError(
                source_id, f"{where}: `image` must be a path or a list of paths, found {path!r}"
            )
        file = self._root / path
        try:
            return file.read_bytes()
        except OSError as error:
            raise SampleError(
                source_id,
                f"{where}: image {file} cannot be read ({error.strerror}); `image` is relative "
                f"to the image root {self._root}: set it if the images lie elsewhere",
            ) from error


def _open(config: SourceConfig) -> SampleSource:
    path = Path(config.path)
    if path.suffix in (".json", ".jsonl"):
        return LlavaSource(path, config.image_root)
    if config.image_root is not None:
        raise ValueError(
            f"{config.path}: image_root was given, but only .json and .jsonl sources name image "
            "files; leave it out"
        )
    if path.suffix == ".tar":
        return TarSource(config.path)
    if path.suffix == ".parquet" or path.is_dir():
        return ParquetSource(path)
    found = "unknown kind of source" if path.exists() else "there is no such file or folder"
    raise ValueError(
        f"{config.path}: {found}; expected the name to end in .json, .jsonl, .tar or .parquet, or "
        "a folder of .parquet files"
    )


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _json_list(path: Path, data: bytes) -> list[Any]:
    try:
        entries = json.loads(data)
    except ValueError as error:
        raise ValueError(
            f"{path}: not valid JSON: {error}; a file with one entry per line must end in .jsonl"
        ) from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a JSON list of entries, found {type(entries).__name__}")
    return entries


def _paths(image: Any) -> list[Any]:
    if image is None:
        return []
    return image if isinstance(image, list) else [image]
