"""docs/read_numbers.py gives strangers the numbers of `CacheReader`, whatever their form."""

import ast
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard

from teacher_cache.codec.columns import output_columns, state_columns, top_k_records
from teacher_cache.codec.transforms import RAGGED_DELTA
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.options import GridSettings
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.shards.formats import shard_format
from tests.docs.test_format_docs import DOCS, run_alone
from tests.support.builders import build
from tests.support.strategies import VOCAB_SIZE, make_cached, make_output, make_spec, with_least

MASS = {"top_k": VOCAB_SIZE, "top_p": 0.9, "min_k": 1}
CODES = {"logits_codec": "affine8", "logits_max_error": 1.0}
COSINES = {"affinity_dtype": "int8", "affinity_max_error": 1.0}
STATES = {"hidden_dtype": "int8", "hidden_group": 4, "hidden_max_error": 0.1}
GRID = {"grid": GridSettings(compressor="dart", layer=2, ratios=(0.25, 0.5, 0.75))}
FORMS: dict[str, dict[str, Any]] = {
    "mass": MASS,
    "affine8": CODES,
    "both": {**MASS, **CODES, **COSINES},
    "cosines": COSINES,
    "states": STATES,
    "grid": {**GRID, "hidden_dtype": "float32"},
    "grid-both": {**GRID, **MASS, **CODES, **STATES},
    "least": {**MASS, "least_logits": True},
}
"""Changes to a spec; the made-up numbers are wilder than a teacher's, so the bounds are wide."""


def form_cache(
    folder: Path, form: str, dtype: torch.dtype = torch.float32
) -> tuple[CacheReader, list[Path]]:
    """A sealed cache of three samples in that form, one without text, one without images."""
    changes = FORMS[form]
    records = "hidden" if "hidden_dtype" in changes else "topk+sketch"
    ratios = changes["grid"].ratios if "grid" in changes else ()
    records = "topk+hidden" if ratios else records
    shapes = [(((12, 12), (8, 8)), 9), (((1, 1),), 0), ((), 4)]
    rows: list[CachedSample] = []
    for number, (views, num_text) in enumerate(shapes):
        output = make_output(records, number, views, num_text, 6, dtype, "top_p" in changes, ratios)
        if "least_logits" in changes:
            output = with_least(output, number)
        rows.append(CachedSample(sample=make_cached(number).sample, output=output))
    build(folder, [rows[:2], rows[2:]], "arrow", make_spec(records, **changes))
    return CacheReader.open(folder), sorted((folder / "shards").iterdir())


READ_NUMBERS = f"""
import json, sys
sys.path.append({str(DOCS)!r})
from read_numbers import numbers
from read_shard import read_shard
_, rows = read_shard(sys.argv[1])
print(json.dumps([
    {{name: [str(v.dtype), list(v.shape), v.tobytes().hex()]
     for name, v in numbers(row).items() if hasattr(v, "dtype")}} for row in rows]))
"""


def _array(shown: list[Any]) -> torch.Tensor:
    dtype, shape, content = shown
    return torch.from_numpy(np.frombuffer(bytes.fromhex(content), dtype).reshape(shape).copy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_the_second_script_gives_the_numbers_of_the_reader(
    tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    reader, files = form_cache(tmp_path / "cache", form, dtype)
    rows = [row for file in files for row in run_alone(READ_NUMBERS, file, cwd=tmp_path)]
    for index, row in enumerate(rows):
        output = reader.read(index, reader.parts).output
        expected: dict[str, torch.Tensor] = state_columns(output)
        kept: dict[str, torch.Tensor] = {}
        for prefix, record in top_k_records(output).items():
            kept[prefix] = record.kept_mask
            expected[f"{prefix}_ids"] = record.ids
            expected[f"{prefix}_logits"] = record.logits
            expected[f"{prefix}_counts"] = record.counts.to(torch.int32)
            if record.log_least is not None:
                expected[f"{prefix}_least"] = record.log_least
        if output.affinity is not None:
            expected["a_cosine"] = output.affinity.cosine
        for name, values in expected.items():
            if name in row:
                wide = values.float() if values.dtype == torch.bfloat16 else values
                found = _array(row[name])
                if name.endswith(("ids", "logits")):
                    inside = kept[name.partition("_")[0]]
                    wide, found = wide[inside], found[inside]
                assert torch.equal(found, wide), (index, name)
        assert {name.partition("_")[2] for name in expected.keys() - row.keys()} <= {"counts"}


def test_ragged_deltas_occur_in_these_shards(tmp_path: Path) -> None:
    for form, column in (("mass", "v_logits"), ("both", "v_codes")):
        _, files = form_cache(tmp_path / form, form)
        frames = shard_format("arrow").open(files[0]).read(0, [column]).frames
        assert RAGGED_DELTA.code == _content(frames[column])[1]


def _content(frame: bytes) -> bytes:
    return zstandard.decompress(frame)


def test_columns_of_a_record_whose_positions_keep_different_numbers_are_named() -> None:
    output = make_output("topk", seed=0, ragged=True)
    assert {"v_counts", "r_counts"} <= output_columns(output).keys()


def test_the_second_script_is_short_and_imports_numpy_alone() -> None:
    text = (DOCS / "read_numbers.py").read_text()
    assert len(text.splitlines()) <= 50
    nodes = list(ast.walk(ast.parse(text)))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert modules - sys.stdlib_module_names == {"numpy"}
