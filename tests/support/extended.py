"""Small caches of a tiny teacher to extend, and sources with what they have and what is new.

As a script (`python -m tests.support.extended samples|records FOLDER`) it kills `emkd extend` at
some of its steps, runs it again, and compares the result with an undisturbed run.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.build.build import build
from pipeline.build.extend_records import extend_records
from pipeline.build.extend_samples import extend_samples
from pipeline.config.build import BuildConfig, SourceConfig
from pipeline.config.extend import ExtendConfig
from teacher_cache.codec.columns import output_columns
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.manifest import Seal
from teacher_cache.schema.options import RecordKind, RecordSettings, holds
from teacher_cache.schema.samples import IMAGE_PLACEHOLDER, Message, Sample, make_sample
from tests.support.faults import kill_at, points_of
from tests.support.llava_json import write_llava_json
from tests.support.strategies import assert_same_bits
from tests.support.tiny import tiny_llava, tiny_samples

BATCH = 3


def samples_to_cache() -> list[Sample]:
    """Twelve samples, the last six with new images; four are further questions about one image."""
    found = tiny_samples(12, seed=7)
    owner = found[0]
    for number in (3, 4, 8, 9):
        messages = (
            Message(role="user", text=f"{IMAGE_PLACEHOLDER}\nhow many? {number}"),
            Message(role="assistant", text="two."),
        )
        images = owner.images if number < 6 else found[6].images
        found[number] = make_sample(f"again-{number}", images, messages)
    return found


def build_config(folder: Path, model: Path, records: RecordKind, count: int) -> BuildConfig:
    """A build over the first samples."""
    source = write_llava_json(folder / f"source-{count}", samples_to_cache()[:count])
    settings = RecordSettings(
        records=records,
        top_k=6 if holds(records, "topk") else 64,
        sketch_rank=4 if holds(records, "sketch") else 128,
        hidden_dtype="float32" if holds(records, "hidden") else "bfloat16",
    )
    return BuildConfig(
        source=SourceConfig(path=str(source)),
        teacher=str(model),
        out=str(folder / f"{records}-{count}"),
        samples_per_shard=BATCH,
        batch_size=BATCH,
        device="cpu",
        settings=settings,
    )


def extension(base: Path | str, out: Path | str, model: Path, **given: Any) -> ExtendConfig:
    """An extension by samples or records, on the CPU."""
    return ExtendConfig(cache=str(base), out=str(out), teacher=str(model), device="cpu", **given)


def built(folder: Path, model: Path, records: RecordKind, count: int = 6) -> Path:
    """A sealed cache of the first samples."""
    config = build_config(folder, model, records, count)
    build(config)
    return Path(config.out)


def more_samples(folder: Path, model: Path, out: Path, records: RecordKind = "topk+sketch") -> Seal:
    """The base of six samples extended by a source that has these and six more."""
    source = build_config(folder, model, records, 12).source.path
    return extend_samples(extension(folder / f"{records}-6", out, model, source=source))


def more_records(folder: Path, model: Path, out: Path) -> Seal:
    """The base of six samples extended by hidden states."""
    hidden = RecordSettings(records="hidden", hidden_dtype="float32")
    return extend_records(extension(folder / "topk+sketch-6", out, model, settings=hidden))


def assert_same_rows(found: CacheReader, expected: CacheReader) -> None:
    """Same keys in the same order, same samples, same columns to the bit."""
    assert found.keys == expected.keys
    assert found.parts == expected.parts
    for index in range(len(expected)):
        ours, theirs = (reader.read(index, reader.parts) for reader in (found, expected))
        assert ours.sample == theirs.sample
        assert ours.output.shared_from == theirs.output.shared_from
        columns = output_columns(theirs.output)
        for name, values in output_columns(ours.output).items():
            assert_same_bits(values, columns[name])


def content(cache: Path) -> dict[str, bytes]:
    """Every public file but those that tell how long something took, by name."""
    files = [*cache.glob("*.safetensors"), cache / "plan.json", *cache.glob("shards/[0-9]*")]
    return {file.name: file.read_bytes() for file in files}


def kill_sometimes(
    folder: Path, model: Path, extend: Callable[[Path, Path, Path], Seal], num_kills: int
) -> None:
    """Kill an extension at steps that are spread over it, and run it again each time."""
    points = points_of(extend, folder, model, folder / "undisturbed")
    for point in points[:: -(-len(points) // num_kills)]:
        out = folder / f"{point[0]}-{point[1]}"
        kill_at(point, extend, folder, model, out)
        extend(folder, model, out)
        assert content(out) == content(folder / "undisturbed"), point


if __name__ == "__main__":
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    place = Path(sys.argv[2])
    teacher = tiny_llava(place / "model")
    built(place, teacher, "topk+sketch")
    kill_sometimes(
        place, teacher, more_samples if sys.argv[1] == "samples" else more_records, num_kills=8
    )
