"""Samples from LLaVA JSON and JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.sources.conversations import build_sample, entry_id
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.samples import Sample


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
