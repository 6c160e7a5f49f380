"""What `emkd inspect` shows: a cache's description of itself, and one record in words and numbers.

Reads through `CacheReader`, so what is shown has passed the reader's own checks. Everything is
plain data (numbers, strings, lists), ready for JSON; `render` lays it out for a terminal.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from teacher_cache.codec import Part
from teacher_cache.reader import CacheReader
from teacher_cache.schema import CachedSample, TeacherOutput, TopKRecord
from teacher_cache.settings import RecordKind

PARTS: dict[RecordKind, tuple[Part, ...]] = {
    "topk": ("vision", "affinity", "response"),
    "topk+sketch": ("vision", "sketch", "affinity", "response"),
    "hidden": ("hidden",),
}
"""What each tier of a cache stores."""


def describe_cache(cache: Path) -> dict[str, Any]:
    """The seal of a cache: counts, bytes, every setting that fixed its numbers, the rejects."""
    reader = CacheReader.open(cache)
    seal = reader.seal
    num_vision = sum(shard.num_vision_tokens for shard in seal.shards)
    return {
        "cache": str(cache),
        "fingerprint": seal.fingerprint,
        "source": seal.source,
        "format": seal.format,
        "samples": seal.num_samples,
        "shards": len(seal.shards),
        "bytes": seal.num_bytes,
        "vision_tokens": num_vision,
        "response_tokens": sum(shard.num_response_tokens for shard in seal.shards),
        "bytes_per_vision_token": round(seal.num_bytes / num_vision, 1) if num_vision else None,
        "build_seconds": round(sum(shard.seconds for shard in seal.shards), 1),
        "spec": dataclasses.asdict(seal.spec),
        "rejected": [dataclasses.asdict(rejected) for rejected in seal.rejected],
    }


def describe_sample(cache: Path, key: str) -> dict[str, Any]:
    """One record: the conversation, the token grids, and summaries of the teacher's outputs.

    `key` may be the beginning of a key; raises ValueError unless it names exactly one sample.
    """
    reader = CacheReader.open(cache)
    found = [index for index, known in enumerate(reader.keys) if known.startswith(key)]
    if len(found) != 1:
        near = [reader.keys[index] for index in found[:5]] or list(reader.keys[:5])
        raise ValueError(
            f"{cache}: {len(found)} samples have a key that begins with {key!r}, expected one; "
            f"{'candidates' if found else 'the first keys are'}: {', '.join(near)}"
        )
    return _describe(reader.read(found[0], PARTS[reader.spec.records]), found[0])


def _describe(cached: CachedSample, index: int) -> dict[str, Any]:
    sample, output = cached.sample, cached.output
    described: dict[str, Any] = {
        "key": sample.key,
        "index": index,
        "source_id": sample.source_id,
        "messages": [f"{message.role}: {message.text}" for message in sample.messages],
        "image_bytes": [len(image) for image in sample.images],
        "views": [
            f"image {view.image} view {view.view}: {view.rows} x {view.cols} vision tokens"
            for view in output.views
        ],
        "content_tokens": len(output.content_ids),
        "response_tokens": int(output.is_response.sum()),
    }
    described.update(_records(output))
    return described


def _records(output: TeacherOutput) -> dict[str, Any]:
    records: dict[str, Any] = {}
    if output.vision is not None:
        records["vision_top_k"] = _top_k(output.vision)
    if output.response is not None:
        records["response_top_k"] = _top_k(output.response)
    if output.sketch is not None:
        codes = output.sketch.codes
        records["sketch"] = {"tokens": codes.shape[0], "rank": codes.shape[1]}
    if output.affinity is not None:
        cosine = output.affinity.cosine
        affinity: dict[str, Any] = {
            "text_tokens": cosine.shape[0],
            "vision_tokens": cosine.shape[1],
        }
        if cosine.numel():
            affinity["range"] = [round(float(cosine.min()), 4), round(float(cosine.max()), 4)]
        records["affinity"] = affinity
    if output.hidden is not None:
        records["hidden"] = {
            "vision": list(output.hidden.vision.shape),
            "text": list(output.hidden.text.shape),
            "predicting": list(output.hidden.predicting.shape),
            "dtype": str(output.hidden.vision.dtype).removeprefix("torch."),
        }
    return records


def _top_k(record: TopKRecord) -> dict[str, Any]:
    rows, kept = record.ids.shape
    if rows == 0:
        return {"positions": 0, "k": kept}
    tails = sorted(math.exp(value) for value in record.log_tail.tolist())
    return {
        "positions": rows,
        "k": kept,
        "tail_mass": {
            "median": round(tails[len(tails) // 2], 5),
            "largest": round(tails[-1], 5),
        },
        "first_position_ids": record.ids[0, :8].tolist(),
    }


def render(described: Mapping[str, Any]) -> str:
    """Lay a description out as YAML, the widest fields last."""
    return yaml.safe_dump(dict(described), sort_keys=False, allow_unicode=True, width=100).rstrip()
