"""Computes digests of values: equal content gives an equal digest in every process.

The order of mappings does not matter. Refuses floats that are not finite and objects without a
stable identity.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import PurePath

import torch
from torch import Tensor

ABSENT: dict[str, bool] = {"absent": True}
"""Metadata of a field that was added later: at its default it is omitted, so that older records
keep their text and digest."""


def canonical(value: object) -> object:
    """Convert a value to its one JSON form, fields under their stored names; else TypeError."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"a fingerprint needs finite numbers, found {value}")
        return value
    if isinstance(value, PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names: Mapping[str, str] = getattr(value, "stored_names", {})
        return {
            names.get(f.name, f.name): canonical(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not (f.metadata.get("absent") and getattr(value, f.name) == f.default)
        }
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"a fingerprint needs string keys, found {sorted(map(repr, value))}")
        return {key: canonical(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    raise TypeError(
        f"a value of type {type(value).__name__} has no stable identity; "
        "turn it into numbers, strings, lists or mappings first"
    )


def digest_json(value: object) -> str:
    """64 hex digits of SHA-256 over the canonical JSON of a value."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def tensor_bytes(values: Tensor) -> bytes:
    """The raw little-endian bytes of a tensor, C order, any dtype."""
    flat = values.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """64 hex digits over (name, dtype, shape, bytes) of tensors, sorted by name."""
    digest = hashlib.sha256()
    for name, values in sorted(tensors, key=lambda item: item[0]):
        digest.update(json.dumps([name, str(values.dtype), list(values.shape)]).encode())
        digest.update(tensor_bytes(values))
    return digest.hexdigest()


def short(digest: str) -> str:
    """The first 12 digits of a digest, for people."""
    return digest[:12]
