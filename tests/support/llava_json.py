"""A small LLaVA JSON source on disk, made of the tiny samples."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.build import BuildConfig, SourceConfig
from pipeline.config.stages import EvaluateConfig
from teacher_cache.schema.options import RecordKind, RecordSettings, holds
from teacher_cache.schema.samples import Sample
from tests.support.tiny import tiny_samples

_NAMES = {"user": "human", "assistant": "gpt", "system": "system"}


def write_llava_json(folder: Path, samples: Sequence[Sample], name: str = "train.json") -> Path:
    """Write samples as LLaVA JSON with their images beside it; returns the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, object]] = []
    for sample in samples:
        files = [f"{sample.source_id}-{number}.png" for number in range(len(sample.images))]
        for file, image in zip(files, sample.images, strict=True):
            (folder / file).write_bytes(image)
        turns = [{"from": _NAMES[m.role], "value": m.text} for m in sample.messages]
        entries.append({"id": sample.source_id, "image": files, "conversations": turns})
    path = folder / name
    path.write_text(json.dumps(entries))
    return path


def small_build(
    folder: Path,
    samples: Sequence[Sample],
    teacher: Path,
    settings: RecordSettings,
    samples_per_shard: int = 3,
    **changes: Any,
) -> BuildConfig:
    """A build of these samples, written to `folder`/data, into `folder`/cache."""
    config = BuildConfig(
        source=SourceConfig(path=str(write_llava_json(folder / "data", samples))),
        teacher=str(teacher),
        out=str(folder / "cache"),
        samples_per_shard=samples_per_shard,
        batch_size=2,
        device="cpu",
        settings=settings,
    )
    return dataclasses.replace(config, **changes)


def evaluation(
    model: Path, folder: Path, out: str = "eval", *, num_samples: int = 7, **settings: Any
) -> EvaluateConfig:
    """An evaluation of tiny samples, written to `folder`/data, into `folder`/`out`."""
    source = write_llava_json(folder / "data", tiny_samples(num_samples))
    defaults: dict[str, Any] = {"batch_size": 3, "max_new_tokens": 6, "device": "cpu"}
    return EvaluateConfig(
        model=str(model),
        source=SourceConfig(path=str(source)),
        out=folder / out,
        **(defaults | settings),
    )


def settings_of(records: RecordKind) -> RecordSettings:
    """Eight logits or sketch directions, where the records have any."""
    return RecordSettings(
        records=records,
        top_k=8 if holds(records, "topk") else 64,
        sketch_rank=8 if holds(records, "sketch") else 128,
    )


def shard_bytes(cache: str | Path) -> dict[str, bytes]:
    """The plan and every shard file of a cache, by name."""
    files = [Path(cache) / "plan.json", *sorted((Path(cache) / "shards").glob("[0-9]*"))]
    return {file.name: file.read_bytes() for file in files}
