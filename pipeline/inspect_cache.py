"""What `emkd inspect` shows of a cache: its seal, where its bytes are, how flat its teacher is.

Promises: counts and settings are the seal's, bytes of each part are those of the shards' frames,
tail masses come from a bounded, seeded sample of rows, which have passed the reader's checks, so
that a cache of any size is described in bounded memory. Everything is plain data (numbers,
strings, lists), ready for JSON; `render` lays it out for a terminal.
"""

import dataclasses
import math
import random
from collections.abc import Mapping
from typing import Any

import torch
import yaml
from torch import Tensor

from teacher_cache.codec import Part
from teacher_cache.reader import CacheReader

QUANTILES = (0.1, 0.5, 0.9, 0.99, 1.0)
_TAILED: tuple[Part, ...] = ("vision", "response")


def describe_cache(reader: CacheReader, num_rows: int = 256) -> dict[str, Any]:
    """The seal of a cache: counts, bytes, every setting that fixed its numbers, the rejects.

    `num_rows` bounds the rows whose tail masses are looked at.
    """
    seal = reader.seal
    num_vision = sum(shard.num_vision_tokens for shard in seal.shards)
    return {
        "cache": str(reader.cache),
        "fingerprint": seal.fingerprint,
        "source": seal.source,
        "format": seal.format,
        "samples": seal.num_samples,
        "shards": len(seal.shards),
        "bytes": seal.num_bytes,
        "samples_with_images": sum(shard.num_with_images for shard in seal.shards),
        "vision_records": sum(shard.num_vision_records for shard in seal.shards),
        "samples_per_vision_record": round(seal.samples_per_vision_record, 2),
        "vision_tokens": num_vision,
        "response_tokens": sum(shard.num_response_tokens for shard in seal.shards),
        "bytes_per_vision_token": round(seal.num_bytes / num_vision, 1) if num_vision else None,
        "build_seconds": round(sum(shard.seconds for shard in seal.shards), 1),
        "tail_mass": _tail_mass(reader, num_rows),
        "spec": dataclasses.asdict(seal.spec),
        "rejected": [dataclasses.asdict(rejected) for rejected in seal.rejected],
    }


def _tail_mass(reader: CacheReader, num_rows: int) -> dict[str, Any] | None:
    """Quantiles of the probability outside the top-k over a sample of rows; None without top-k."""
    parts: list[Part] = [part for part in _TAILED if part in reader.parts]
    if not parts:
        return None
    count = min(num_rows, len(reader))
    tails: dict[Part, list[Tensor]] = {part: [] for part in parts}
    for index in sorted(random.Random(0).sample(range(len(reader)), count)):
        output = reader.read(index, parts).output
        for part in parts:
            tails[part].append(getattr(output, part).log_tail.double().exp())
    return {"rows": count, **{part: _quantiles(torch.cat(tails[part])) for part in parts}}


def _quantiles(values: Tensor) -> dict[str, float] | None:
    if not len(values):
        return None
    ordered = values.sort().values
    last = len(ordered) - 1
    return {
        f"{100 * share:g}%": float(f"{float(ordered[math.ceil(share * last)]):.4g}")
        for share in QUANTILES
    }


def render(described: Mapping[str, Any]) -> str:
    """Lay a description out as YAML, the widest fields last."""
    return yaml.safe_dump(dict(described), sort_keys=False, allow_unicode=True, width=100).rstrip()
