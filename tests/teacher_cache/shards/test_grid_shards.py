"""Records of a grid are stored, checked and taken along like the ordinary ones, in every form."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codec.columns import columns_of, output_columns
from teacher_cache.codec.error_bounds import CodecError, require_within_bounds
from teacher_cache.derive.export import export_cache
from teacher_cache.derive.merge import merge_caches
from teacher_cache.derive.subset import Selection, subset_cache
from teacher_cache.folder.garbage import collect_garbage
from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.verify import verify_cache
from teacher_cache.schema.manifest import CacheSpec
from teacher_cache.schema.options import GridSettings, RecordKind, ShardFormatName
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.shards.formats import shard_format
from teacher_cache.shards.rows import decode_row, encode_row, tier_parts
from tests.docs.test_format_forms import CODES, MASS
from tests.support.builders import build, flip
from tests.support.strategies import (
    FLOATS,
    assert_same,
    assert_same_outputs,
    make_cached,
    make_output,
    make_spec,
)

RATIOS = (0.25, 0.5, 0.75)
GRID = GridSettings(compressor="dart", layer=2, ratios=RATIOS)
STATES = {"hidden_dtype": "int8", "hidden_group": 4, "hidden_max_error": 0.1}
KINDS: tuple[RecordKind, ...] = ("topk", "topk+sketch", "hidden", "topk+hidden")


def cached(number: int, records: RecordKind = "topk", **changes: Any) -> CachedSample:
    output = make_output(records, number, ((2, 3),), 8, ratios=RATIOS, **changes)
    return CachedSample(sample=make_cached(number).sample, output=output)


def cache(folder: Path, form: ShardFormatName = "arrow", first: int = 0) -> CacheReader:
    rows = [cached(first + number, "topk+hidden") for number in range(4)]
    build(folder, [rows[:3], rows[3:]], form, make_spec("topk+hidden", grid=GRID))
    return CacheReader.open(folder)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    records=st.sampled_from(KINDS),
    dtype=st.sampled_from(FLOATS),
    num_ratios=st.integers(1, 9),
    num_text=st.integers(0, 8),
    ragged=st.booleans(),
)
def test_any_output_with_a_grid_comes_back_to_the_bit(
    seed: int,
    records: RecordKind,
    dtype: torch.dtype,
    num_ratios: int,
    num_text: int,
    ragged: bool,
) -> None:
    ratios = tuple((number + 1) / 16 for number in range(num_ratios))
    output = make_output(
        records, seed, num_text=num_text, dtype=dtype, ragged=ragged, ratios=ratios
    )
    grid = GridSettings(compressor="random", layer=1, ratios=ratios)
    spec = make_spec(records, grid=grid, **(MASS if ragged else {}))
    row = CachedSample(sample=make_cached(0).sample, output=output)
    encoded = encode_row(row, spec)
    assert encoded.frames.keys() == columns_of(tier_parts(spec), spec)
    back = decode_row(encoded, spec).output
    assert_same_outputs(back, output)
    assert tuple(back.response_grid or back.hidden_grid or ()) == ratios


@pytest.mark.parametrize(("records", "changes"), [("topk", CODES), ("hidden", STATES)])
def test_eight_bits_are_held_to_their_bound_in_the_grid_too(
    records: RecordKind, changes: dict[str, Any]
) -> None:
    spec = make_spec(records, grid=GRID, **changes)
    row = cached(1, records)
    back = decode_row(encode_row(row, spec), spec).output
    if records == "hidden":
        assert back.hidden_grid is not None
        assert all(states.dtype == torch.float32 for states in back.hidden_grid.values())
    tight = {name: 1e-9 for name in changes if name.endswith("max_error")}
    calm = dataclasses.replace(row.output, vision=None, response=None, affinity=None, hidden=None)
    columns = output_columns(calm, spec)
    with pytest.raises(CodecError, match="column g1_"):
        require_within_bounds("s", calm, columns, dataclasses.replace(spec, **tight))


def test_a_grid_is_read_only_where_it_is_asked_for(tmp_path: Path) -> None:
    reader = cache(tmp_path / "cache")
    assert {"response_grid", "hidden_grid"} <= reader.parts
    columns = columns_of({"response"}, reader.spec)
    assert not [name for name in columns if name.startswith("g")]
    assert reader.read(0, {"response"}).output.response_grid is None
    grid = reader.read(0, {"response_grid"}).output
    assert grid.response is None
    assert tuple(grid.response_grid or ()) == RATIOS
    build(tmp_path / "plain", [[make_cached(0)]])
    plain = CacheReader.open(tmp_path / "plain")
    with pytest.raises(ValueError, match="asked for response_grid"):
        plain.read(0, {"response_grid"})


@pytest.mark.parametrize("ratios", [(), (0.25, 0.5), (0.25, 0.5, 0.8)])
def test_the_writer_takes_the_ratios_of_the_spec_only(ratios: tuple[float, ...]) -> None:
    output = make_output("topk", 0, ratios=ratios)
    row = CachedSample(sample=make_cached(0).sample, output=output)
    with pytest.raises(ValueError, match=r"gave ratios|a cache of topk holds"):
        encode_row(row, make_spec("topk", grid=GRID))
    if ratios:
        with pytest.raises(ValueError, match="a cache of topk holds"):
            encode_row(row, make_spec("topk"))


def test_a_damaged_grid_is_found(tmp_path: Path) -> None:
    reader = cache(tmp_path)
    file = next((tmp_path / "shards").glob("00001*"))
    frame = shard_format("arrow").open(file).read(0, ["g3_predicting"]).frames["g3_predicting"]
    flip(file, frame)
    assert any("g3_predicting" in problem for problem in verify_cache(tmp_path).problems)
    assert reader.read(3, {"response_grid"}).output.response_grid is not None


@pytest.mark.parametrize("form", ["arrow", "webdataset"])
def test_every_tool_takes_a_grid_along(tmp_path: Path, form: ShardFormatName) -> None:
    base = cache(tmp_path / "base", form)
    other: ShardFormatName = "webdataset" if form == "arrow" else "arrow"
    export_cache(tmp_path / "base", tmp_path / "there", other)
    export_cache(tmp_path / "there", tmp_path / "back", form)
    for path in (tmp_path / "base" / "shards").iterdir():
        assert (tmp_path / "back" / "shards" / path.name).read_bytes() == path.read_bytes()
    subset_cache(tmp_path / "there", tmp_path / "part", Selection(keys=base.keys[1:3]))
    cache(tmp_path / "more", form, first=20)
    merge_caches([tmp_path / "base", tmp_path / "more"], tmp_path / "all")
    for name, count in (("there", 4), ("back", 4), ("part", 2), ("all", 8)):
        found = CacheReader.open(tmp_path / name)
        assert (len(found), found.spec, verify_cache(tmp_path / name).problems) == (
            count,
            base.spec,
            (),
        )
        for index in range(len(found)):
            key = found.keys[index]
            if key in base.keys:
                here = found.read(index, found.parts)
                assert_same(here, base.read(base.find(key), base.parts))
        assert collect_garbage(tmp_path / name).removed == ()


def test_specs_differ_by_their_grids_and_ordinary_ones_are_what_they_were() -> None:
    specs: list[CacheSpec] = [
        make_spec("topk", grid=grid)
        for grid in (None, GRID, dataclasses.replace(GRID, ratios=(0.25,)))
    ]
    assert len({spec.fingerprint for spec in specs}) == 3
    # Written down when there was no grid yet.
    assert (
        specs[0].fingerprint == "72424da0af4fd317290649fcd77f87be0b147546916067cfa46581eb22b2bf4b"
    )
