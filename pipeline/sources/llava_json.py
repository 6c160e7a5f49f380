"""Reads samples from JSON and JSON lines, with images in files beside them."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.sources.conversations import (
    build_sample,
    entry_id,
    parse_json,
    refusing,
    require_object,
)
from pipeline.sources.media import IMAGE_FIELDS, ImageRules
from teacher_cache.schema.regular_file import read_regular
from teacher_cache.schema.samples import Sample

METADATA_FILE = "metadata.jsonl"
"""The file of a folder of images in the hub's layout `imagefolder`."""
_FILE_FIELDS = {"file_name": "image", "file_names": "images"}
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"|[][{},]', re.DOTALL)
"""What tells where an entry ends: texts, brackets and commas."""


class LlavaSource:
    """A JSON list of entries, or one JSON object per line (.jsonl).

    An entry has turns (turns.py), optionally `id`, and optionally `image` or `images`: paths
    relative to the rules' root, or data URLs. In a file named metadata.jsonl, `file_name` and
    `file_names` are read as well, as the images of an entry without those fields.
    """

    def __init__(self, path: Path, rules: ImageRules) -> None:
        self.name = str(path)
        self.unread = Counter[str]()
        self._path = path
        self._rules = rules
        try:
            data = read_regular(path)
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be read ({error.strerror}); check the path"
            ) from error
        self._entries: list[tuple[str, Any]]
        """(place in the file, entry); bytes, as of JSON lines, are parsed when they are read."""
        if path.suffix == ".jsonl":
            lines = enumerate(data.split(b"\n"), start=1)
            self._entries = [(f"line {n}", line) for n, line in lines if line.strip()]
        else:
            self._entries = [(f"entry {n}", e) for n, e in enumerate(_json_list(path, data))]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        place, entry = self._entries[index]
        where, source_id = f"{self._path}, {place}", f"{self._path.name}:{index}"
        with refusing(where, source_id):
            if isinstance(entry, bytes):
                entry = parse_json(entry, where, source_id)
            fields = require_object(entry, where, source_id)
            if self._path.name == METADATA_FILE and fields.keys().isdisjoint(IMAGE_FIELDS):
                fields = {_FILE_FIELDS.get(name, name): value for name, value in fields.items()}
            source_id = entry_id(fields, source_id)
            return build_sample(where, source_id, fields, self._rules, self.unread)


def _json_list(path: Path, data: bytes) -> list[Any]:
    try:
        entries = json.loads(data)
    except RecursionError:  # one entry is nested too deep: each is parsed by itself
        entries = list(_entry_texts(data))
    except ValueError as error:
        raise ValueError(
            f"{path}: not valid JSON: {error}; a file with one entry per line must end in .jsonl"
        ) from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a JSON list of entries, found {type(entries).__name__}")
    return entries


def _entry_texts(data: bytes) -> Iterator[bytes]:
    """The text of each entry of a JSON list, whatever is in the entries."""
    depth, start = 0, 0
    for token in _TOKEN.finditer(data):
        mark = token[0]
        if mark in (b"[", b"{"):
            depth += 1
            start = token.end() if depth == 1 else start
        elif mark in (b"]", b"}"):
            depth -= 1
        if (depth == 1 and mark == b",") or (depth == 0 and mark == b"]"):
            yield data[start : token.start()]
            start = token.end()
