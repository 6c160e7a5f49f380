"""Reads samples from LLaVA JSON and JSON lines."""

import json
from pathlib import Path
from typing import Any

from pipeline.sources.conversations import build_sample, entry_id, parse_json, require_object
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.samples import Sample


class LlavaSource:
    """LLaVA's training files: one JSON list, or one JSON object per line (.jsonl).

    An entry has `conversations`, optionally `id`, and optionally `image`: a path or a list of
    paths relative to `image_root`. Other fields are ignored.
    """

    def __init__(self, path: Path, image_root: Path | None) -> None:
        self.name = str(path)
        self._path = path
        self._root = path.parent if image_root is None else image_root
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be read ({error.strerror}); check the path"
            ) from error
        self._is_lines = path.suffix == ".jsonl"
        self._entries: list[tuple[str, Any]]
        """(place in the file, entry); entries of JSON lines are parsed when they are read."""
        if self._is_lines:
            lines = enumerate(data.split(b"\n"), start=1)
            self._entries = [(f"line {n}", line) for n, line in lines if line.strip()]
        else:
            self._entries = [(f"entry {n}", e) for n, e in enumerate(_json_list(path, data))]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        place, entry = self._entries[index]
        where, source_id = f"{self._path}, {place}", f"{self._path.name}:{index}"
        if self._is_lines:
            entry = parse_json(entry, where, source_id)
        fields = require_object(entry, where, source_id)
        source_id = entry_id(fields, source_id)
        found = fields.get("image")
        paths = found if isinstance(found, list) else [] if found is None else [found]
        images = [self._image(path, where, source_id) for path in paths]
        return build_sample(where, source_id, images, fields)

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
                f"to the image root {self._root}: set it if the images are elsewhere",
            ) from error


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
