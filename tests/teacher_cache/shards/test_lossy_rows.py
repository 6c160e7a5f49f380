"""Rows of every form through a shard: exact or within the stated bound, hostile columns refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacher_cache.codec.columns import (
    TIER_PARTS,
    columns_of,
    encode_column,
    encode_columns,
    output_columns,
)
from teacher_cache.codec.error_bounds import CodecError
from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.schema.manifest import CacheSpec
from teacher_cache.schema.options import GridSettings, ShardFormatName
from teacher_cache.schema.teacher_output import CachedSample, TeacherOutput, TopKRecord
from teacher_cache.shards.formats import shard_format
from teacher_cache.shards.rows import decode_row, encode_row, read_sample, tier_parts
from tests.support.strategies import (
    BEARTYPE_DRAWS,
    VOCAB_SIZE,
    assert_same_bits,
    make_cached,
    make_output,
    make_spec,
    teacher_outputs,
)

pytestmark = BEARTYPE_DRAWS

MASS = {"top_k": VOCAB_SIZE, "top_p": 0.9, "min_k": 1}
CODES = {"logits_codec": "affine8", "logits_max_error": 0.2}
COSINES = {"affinity_dtype": "int8", "affinity_max_error": 0.2}
STATES = {"hidden_dtype": "int8", "hidden_group": 4, "hidden_max_error": 0.02}
GRID = {"grid": GridSettings(compressor="dart", layer=2, ratios=(0.25, 0.5, 0.75))}


def _cached(output: TeacherOutput) -> CachedSample:
    return CachedSample(sample=make_cached(0).sample, output=output)


def _back(output: TeacherOutput, spec: CacheSpec) -> TeacherOutput:
    return decode_row(encode_row(_cached(output), spec), spec).output


def _assert_same_entries(left: TopKRecord | None, right: TopKRecord | None) -> None:
    """All but the logits: padding aside, which is as wide as the row that keeps most."""
    assert left is not None
    assert right is not None
    assert_same_bits(left.logsumexp, right.logsumexp)
    assert_same_bits(left.log_tail, right.log_tail)
    assert left.counts.tolist() == right.counts.tolist()
    assert left.ids[left.kept_mask].tolist() == right.ids[right.kept_mask].tolist()


@settings(deadline=None, max_examples=40)
@given(data=st.data(), ragged=st.booleans(), codes=st.booleans(), cosines=st.booleans())
def test_any_top_k_output_comes_back_in_every_form(
    data: st.DataObject, ragged: bool, codes: bool, cosines: bool
) -> None:
    output = data.draw(teacher_outputs("topk", ragged=ragged))
    changes: dict[str, Any] = {**(MASS if ragged else {}), **(CODES if codes else {})}
    spec = make_spec("topk", **changes, **(COSINES if cosines else {}))
    back = _back(output, spec)
    for left, right in ((output.vision, back.vision), (output.response, back.response)):
        _assert_same_entries(left, right)
        assert left is not None
        assert right is not None
        kept, found = left.logits[left.kept_mask], right.logits[right.kept_mask]
        if codes:
            assert right.logits.dtype == torch.float32
            assert bool(((kept.double() - found.double()).abs() <= 0.2).all())
        else:
            assert_same_bits(kept, found)
    assert output.affinity is not None
    assert back.affinity is not None
    if cosines:
        apart = (output.affinity.cosine.double() - back.affinity.cosine.double()).abs()
        assert bool((apart <= 0.2).all())
    else:
        assert_same_bits(output.affinity.cosine, back.affinity.cosine)


@settings(deadline=None, max_examples=20)
@given(data=st.data(), group=st.integers(1, 6))
def test_any_hidden_output_comes_back_within_its_bound(data: st.DataObject, group: int) -> None:
    output = data.draw(teacher_outputs("hidden"))
    spec = make_spec("hidden", **{**STATES, "hidden_group": group})
    back = _back(output, spec)
    assert output.hidden is not None
    assert back.hidden is not None
    for name in ("vision", "text", "predicting"):
        exact, found = getattr(output.hidden, name).double(), getattr(back.hidden, name)
        assert found.dtype == torch.float32
        for one, two in zip(exact, found.double(), strict=True):
            assert float((one - two).norm()) <= 0.02 * float(one.norm())


def test_codes_that_are_read_back_and_stored_again_lose_nothing_more() -> None:
    spec = make_spec("topk", **{**MASS, **CODES, **COSINES})
    once = _back(make_output("topk", 1, ragged=True, num_kept=9), spec)
    twice = output_columns(_back(once, spec))
    for name, values in output_columns(once).items():
        assert torch.equal(twice[name], values), name


@pytest.mark.parametrize(
    ("changes", "column", "remedy"),
    [
        ({**CODES, "logits_max_error": 1e-6}, "v_codes", "choose logits_codec exact"),
        ({**COSINES, "affinity_max_error": 1e-6}, "a_codes", "choose affinity_dtype float16"),
        ({**STATES, "hidden_max_error": 1e-6}, "h_vision", "choose a smaller hidden_group"),
    ],
)
def test_the_writer_refuses_a_sample_that_loses_more_than_the_spec_states(
    changes: dict[str, Any], column: str, remedy: str
) -> None:
    records = "hidden" if "hidden_dtype" in changes else "topk"
    cached = _cached(make_output(records, 0, num_kept=6))
    with pytest.raises(CodecError) as caught:
        encode_row(cached, make_spec(records, **changes))
    message = str(caught.value)
    assert f"sample {cached.sample.key} ({cached.sample.source_id}): column {column} has" in message
    assert "is 1e-06" in message
    assert remedy in message


@pytest.mark.parametrize(
    "token", [131_071, 131_072, 151_935, 152_063, 2**24 - 1], ids=lambda token: f"id-{token}"
)
def test_ids_of_any_vocabulary_up_to_2_24_come_back(tmp_path: Path, token: int) -> None:
    ids = torch.tensor([[token, 0], [1, token]], dtype=torch.int32)
    record = TopKRecord(
        ids=ids,
        logits=torch.tensor([[2.0, 1.0], [2.0, 1.0]]),
        logsumexp=torch.full((2,), 3.0),
        log_tail=torch.full((2,), -1.0),
        vocab_size=token + 1,
    )
    output = make_output("topk", 0, views=((1, 2),), num_text=0)
    cached = _cached(dataclasses.replace(output, vision=record, response=_none(record)))
    spec = make_spec("topk", vocab_size=token + 1)
    path = tmp_path / "shard"
    columns = columns_of(TIER_PARTS["topk"], spec)
    shard_format("arrow").write(path, [encode_row(cached, spec)], columns, {})
    shard = shard_format("arrow").open(path)
    back = read_sample(shard, 0, cached.sample.key, TIER_PARTS["topk"], spec).output
    assert back.vision is not None
    assert_same_bits(back.vision.ids, ids)


def _none(record: TopKRecord) -> TopKRecord:
    return dataclasses.replace(
        record,
        ids=record.ids[:0],
        logits=record.logits[:0],
        logsumexp=record.logsumexp[:0],
        log_tail=record.log_tail[:0],
    )


def test_larger_vocabularies_and_larger_ids_are_refused_at_writing() -> None:
    output = make_output("topk", 0)
    assert output.vision is not None
    with pytest.raises(ValueError, match="of at most 16777216"):
        dataclasses.replace(output.vision, vocab_size=2**24 + 1)
    with pytest.raises(ValueError, match=r"expected 0\.\.10"):
        dataclasses.replace(output.vision, ids=output.vision.ids + VOCAB_SIZE)


def _set(value: float) -> Callable[[Tensor], Tensor]:
    def change(values: Tensor) -> Tensor:
        changed = values.clone()
        changed.view(-1)[0] = value
        return changed

    return change


NAN, INF = float("nan"), float("inf")
HOSTILE: list[tuple[dict[str, Any], str, Callable[[Tensor], Tensor]]] = [
    *(({}, "v_logits", _set(value)) for value in (NAN, INF, -INF)),
    *(({}, name, _set(value)) for name in ("v_lse", "r_tail", "a_cosine") for value in (NAN, -INF)),
    *((CODES, name, _set(value)) for name in ("v_low", "v_high") for value in (NAN, INF, -INF)),
    *((COSINES, name, _set(NAN)) for name in ("a_low", "a_high")),
    *((STATES, "h_vision_scale", _set(value)) for value in (NAN, INF)),
    *((MASS, "v_counts", _set(value)) for value in (0, -1, VOCAB_SIZE + 1, 2**31 - 1)),
    (MASS, "v_counts", lambda counts: counts[1:]),
    (MASS, "v_ids", lambda ids: ids[1:]),
    (MASS, "v_logits", lambda logits: logits[None]),
    (MASS, "v_ids", _set(VOCAB_SIZE)),
    ({}, "v_ids", _set(-1)),
    ({}, "v_lse", lambda values: values[1:]),
    ({}, "v_ids", lambda ids: ids.reshape(-1)),
    (CODES, "v_low", lambda low: low[1:]),
    (CODES, "v_codes", lambda codes: codes.reshape(-1)),
    (STATES, "h_vision_scale", lambda scale: scale.repeat(1, 9)),
    (STATES, "h_vision_scale", lambda scale: scale[1:]),
    (STATES, "h_vision", lambda codes: codes.reshape(-1)),
    (GRID, "g1_ids", _set(VOCAB_SIZE)),
    (GRID, "g3_ids", _set(-1)),
    *((GRID, name, _set(NAN)) for name in ("g2_logits", "g1_tail", "g1_predicting")),
    (GRID, "g2_lse", lambda lse: lse[1:]),
    (GRID, "g2_logits", lambda logits: logits[:, 1:]),
    ({**GRID, **MASS}, "g1_counts", lambda counts: counts + 1),
    ({**GRID, **MASS}, "g2_counts", _set(0)),
    ({**GRID, **CODES}, "g3_low", lambda low: low[1:]),
    (GRID, "g2_predicting", lambda states: states[1:]),
    ({**GRID, **STATES}, "g3_predicting_scale", lambda scale: scale[1:]),
]


@pytest.mark.parametrize("form", ["arrow", "webdataset"])
@pytest.mark.parametrize(("changes", "column", "change"), HOSTILE)
def test_columns_that_lie_are_refused_although_their_checks_are_right(
    tmp_path: Path,
    changes: dict[str, Any],
    column: str,
    change: Callable[[Tensor], Tensor],
    form: ShardFormatName,
) -> None:
    records = "hidden" if column.startswith("h_") or "predicting" in column else "topk"
    spec = make_spec(records, **changes)
    parts, ragged = tier_parts(spec), "top_p" in changes
    output = make_output(records, 3, ((2, 3),), 8, 5, ragged=ragged, ratios=spec.ratios)
    row = encode_row(_cached(output), spec)
    columns = output_columns(output, spec)
    frames = {**encode_columns(columns), column: encode_column(column, change(columns[column]))}
    hostile = dataclasses.replace(row, frames=frames)
    shard_format(form).write(tmp_path / "shard", [hostile], columns_of(parts, spec), {})
    shard = shard_format(form).open(tmp_path / "shard")
    with pytest.raises(ShardCorruptError, match=row.key):
        read_sample(shard, 0, row.key, parts, spec)


@pytest.mark.parametrize(
    ("ragged", "changes", "message"),
    [
        (True, {}, "different numbers of entries, the cache has top_p None"),
        (False, MASS, r"all K entries, the cache has top_p 0\.9"),
        (True, {**MASS, "top_k": 1}, "the cache has top_k 1"),
    ],
)
def test_records_that_are_cut_in_another_way_than_the_spec_says_are_refused(
    ragged: bool, changes: dict[str, Any], message: str
) -> None:
    output = make_output("topk", 0, num_kept=6, ragged=ragged)
    with pytest.raises(ValueError, match=message):
        encode_row(_cached(output), make_spec("topk", **changes))
