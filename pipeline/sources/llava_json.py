"""Reads samples from JSON and JSON lines, with images in files beside them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.sources.conversations import build_sample, entry_id, parse_json, require_object
from teacher_cache.schema.samples import Sample


class LlavaSource:
    """A JSON list of entries, or one JSON object per line (.jsonl).

    An entry has turns (turns.py), optionally `id`, and optionally `image` or `images`: paths
    relative to `image_root`, or data URLs.
    """

    def __init__(self, path: Path, image_root: Path | None) -> None:
        self.name = str(path)
        self.unread = Counter[str]()
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
        return build_sample(where, source_id, fields, self._root, self.unread)


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
