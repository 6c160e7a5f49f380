"""Sealed caches of earlier versions are read as before; new caches have the bytes they always had.

Each cache in tests/golden lies beside the numbers that it holds, as safetensors. `written.json` has
the SHA-256 of every file of the caches that `write_again` makes from these records, taken with the
code of December 2026 before it moved into rooms. It holds for zstd 1.5.7; where another zstd packs
a frame to other bytes, `written-zstd-VERSION.json` has the caches that differ.

`python -m tests.whole.test_golden FOLDER` writes a new set of golden caches. Each layout version
keeps its own set for as long as that layout is read.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file
from torch import Tensor

from teacher_cache.codec.columns import output_columns, output_from_columns
from teacher_cache.derive.export import export_cache
from teacher_cache.derive.merge import merge_caches
from teacher_cache.derive.subset import Selection, subset_cache
from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.verify import BROKEN_PROMISE, verify_cache
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import SketchBasis
from teacher_cache.records.tail_template import TailTemplate
from teacher_cache.schema.manifest import LAYOUT_VERSION
from teacher_cache.schema.teacher_output import CachedSample
from tests.docs.test_format_forms import FORMS, GRID, form_cache
from tests.support.builders import build, published
from tests.support.paths import GOLDEN
from tests.support.strategies import (
    RANK,
    VOCAB_SIZE,
    WIDTH,
    asked_again,
    make_cached,
    make_spec,
)

NUMBERS = "numbers.safetensors"


def numbers_of(cache: Path) -> dict[str, Tensor]:
    """Every tensor of every sample, as a reader gives it, by sample key and name."""
    reader = CacheReader.open(cache)
    found: dict[str, Tensor] = {}
    for index, key in enumerate(reader.keys):
        output = reader.read(index, reader.parts).output
        for field in dataclasses.fields(output):
            value = getattr(output, field.name)
            if isinstance(value, Mapping):
                for ratio, at in cast(Mapping[float, object], value).items():
                    found |= _inside(f"{key}/{field.name}.{ratio}", at)
            else:
                found |= _inside(f"{key}/{field.name}", value)
    return found


def _inside(name: str, value: object) -> dict[str, Tensor]:
    """A tensor, or the tensors of a record."""
    if isinstance(value, Tensor):
        return {name: value}
    if not dataclasses.is_dataclass(value):
        return {}
    inner = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {f"{name}.{n}": each for n, each in inner.items() if isinstance(each, Tensor)}


def write(folder: Path) -> None:
    """A cache in each form, one that shares vision records, and a tar of it; and their numbers."""
    for form in FORMS:
        form_cache(folder / form, form)
    owner = make_cached(0, "topk+sketch")
    shared = [[owner, asked_again(owner, 1, "topk+sketch")], [make_cached(2, "topk+sketch")]]
    build(folder / "shared", shared, "arrow", make_spec("topk+sketch"))
    export_cache(folder / "shared", folder / "shared-tar", "webdataset")
    for cache in sorted(folder.iterdir()):
        contiguous = {name: values.contiguous() for name, values in numbers_of(cache).items()}
        save_file(contiguous, cache / NUMBERS)


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Equal names, dtypes and bits."""
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype, name
        assert torch.equal(found[name], values), name


@pytest.mark.parametrize(
    "name", sorted(str(file.parent.relative_to(GOLDEN)) for file in GOLDEN.rglob(NUMBERS))
)
def test_sealed_caches_of_earlier_versions_are_read(name: str) -> None:
    cache = GOLDEN / name
    same(numbers_of(cache), load_file(cache / NUMBERS))
    problems = verify_cache(cache).problems
    # Their numbers were drawn at random: every byte is intact, and no teacher said this.
    assert problems
    assert all(problem.endswith(BROKEN_PROMISE) for problem in problems)


def test_this_layout_has_golden_caches() -> None:
    assert {file.name for file in (GOLDEN / f"layout-{LAYOUT_VERSION}").iterdir()} >= set(FORMS)


def stored_shards(cache: Path) -> list[list[CachedSample]]:
    """Every record of a golden cache, shard by shard: the same on every processor."""
    reader = CacheReader.open(cache)
    rows = (reader.read(index, reader.parts) for index in range(len(reader)))
    return [[next(rows) for _ in range(size)] for size in reader.shard_sizes]


def halved(cached: CachedSample, ratios: tuple[float, ...] = ()) -> CachedSample:
    """The row with logits and states in bfloat16."""
    wide = ("_logits", "_predicting", "h_text", "h_vision")
    columns = {
        name: values.bfloat16() if name.endswith(wide) else values
        for name, values in output_columns(cached.output).items()
    }
    output = output_from_columns(columns, VOCAB_SIZE, None, ratios)
    owner = cached.output.shared_from
    return dataclasses.replace(cached, output=dataclasses.replace(output, shared_from=owner))


def counted(*shape: int) -> Tensor:
    """0, 1/8, 2/8, ... in a shape."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape) / 8


HEAD = LmHead(weight=counted(VOCAB_SIZE, WIDTH))
TEMPLATE = TailTemplate(vision=counted(VOCAB_SIZE), response=-counted(VOCAB_SIZE))
SKETCH = SketchBasis(
    hidden_mean=counted(WIDTH),
    projection=counted(WIDTH, RANK),
    mean_logits=counted(VOCAB_SIZE),
    directions=counted(VOCAB_SIZE, RANK),
)


def write_again(folder: Path) -> None:
    """The records of every golden cache in both formats, with assets, in bfloat16, and derived."""
    golden = GOLDEN / "layout-1"
    for form in ("arrow", "webdataset"):
        for name in (*FORMS, "shared"):
            spec = CacheReader.open(golden / name).spec
            build(folder / f"{name}-{form}", stored_shards(golden / name), form, spec)
    shards = [[halved(row) for row in rows] for rows in stored_shards(golden / "shared")]
    digests = {"sketch_digest": SKETCH.digest, "template_digest": TEMPLATE.digest}
    spec = make_spec("topk+sketch", logits_dtype="bfloat16", **digests)
    build(folder / "half-sketch", shards, "arrow", spec, None, SKETCH, TEMPLATE)
    ratios = GRID["grid"].ratios
    shards = [[halved(row, ratios) for row in rows] for rows in stored_shards(golden / "grid")]
    dtypes = {"logits_dtype": "bfloat16", "hidden_dtype": "bfloat16"}
    spec = make_spec("topk+hidden", head_digest=HEAD.digest, **dtypes, **GRID)
    build(folder / "half-grid", shards, "arrow", spec, HEAD)
    shared = folder / "shared-arrow"
    export_cache(shared, folder / "exported", "webdataset")
    keys = CacheReader.open(shared).keys
    for name, chosen in (("first", keys[:1]), ("rest", keys[1:])):
        subset_cache(shared, folder / name, Selection(keys=chosen))
    merge_caches([folder / "rest", folder / "first"], folder / "merged")


def digests_of(folder: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of every published file, by cache and name."""
    return {
        cache.name: {
            name: hashlib.sha256(data).hexdigest() for name, data in published(cache).items()
        }
        for cache in sorted(folder.iterdir())
    }


def test_new_caches_have_the_bytes_they_always_had(tmp_path: Path) -> None:
    write_again(tmp_path)
    wanted = json.loads((GOLDEN / "written.json").read_text())
    version = ".".join(map(str, zstandard.ZSTD_VERSION))
    for file in GOLDEN.glob(f"written-zstd-{version}.json"):
        wanted |= json.loads(file.read_text())
    assert digests_of(tmp_path) == wanted


if __name__ == "__main__":
    write(Path(sys.argv[1]))
