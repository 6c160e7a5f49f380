"""Caches of an earlier day, kept in tests/golden, are read as they were written, for ever.

Beside each cache lie the numbers that it held, as safetensors, so that nothing of today is needed
to know them. `python -m tests.test_golden FOLDER` writes a new set; a layout version gets one of
its own, and the old ones stay for as long as their layout is read.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from teacher_cache.derive.export import export_cache
from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.verify import verify_cache
from teacher_cache.schema.manifest import LAYOUT_VERSION
from tests.docs.test_format_forms import FORMS, form_cache
from tests.support.builders import build
from tests.support.paths import GOLDEN
from tests.support.strategies import asked_again, make_cached, make_spec

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
def test_shards_of_an_earlier_day_are_read(name: str) -> None:
    cache = GOLDEN / name
    same(numbers_of(cache), load_file(cache / NUMBERS))
    assert not verify_cache(cache).problems


def test_this_layout_has_golden_caches() -> None:
    assert {file.name for file in (GOLDEN / f"layout-{LAYOUT_VERSION}").iterdir()} >= set(FORMS)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
