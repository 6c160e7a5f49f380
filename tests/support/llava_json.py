"""A small LLaVA JSON source on disk, made of the tiny samples."""

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.build import BuildConfig, SourceConfig
from teacher_cache.schema.options import RecordSettings
from teacher_cache.schema.samples import Sample

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
) -> BuildConfig:
    """A build of these samples, written to `folder`/data, into `folder`/cache."""
    return BuildConfig(
        source=SourceConfig(path=str(write_llava_json(folder / "data", samples))),
        teacher=str(teacher),
        out=str(folder / "cache"),
        samples_per_shard=samples_per_shard,
        batch_size=2,
        device="cpu",
        settings=settings,
    )


def shard_bytes(cache: str | Path) -> dict[str, bytes]:
    """The plan and every shard file of a cache, by name."""
    files = [Path(cache) / "plan.json", *sorted((Path(cache) / "shards").glob("[0-9]*"))]
    return {file.name: file.read_bytes() for file in files}
