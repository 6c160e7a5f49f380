"""Numbers that no teacher can have said are found behind valid checksums; honest ones pass."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teacher_cache.codec.columns import encode_columns
from teacher_cache.codec.frames import decode_frame
from teacher_cache.codec.number_checks import same_text
from teacher_cache.folder.verify import verify_cache
from teacher_cache.folder.writer import seal_cache, write_assets, write_encoded_shard, write_plan
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.tail_template import TailTemplate
from teacher_cache.schema.manifest import CacheSpec
from teacher_cache.schema.options import GridSettings
from teacher_cache.schema.teacher_output import AffinityRecord, CachedSample
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.shards.rows import encode_row
from teacher_cache.storage.local_store import LocalStore
from tests.support.builders import build, edit_record
from tests.support.strategies import (
    FLOATS,
    VOCAB_SIZE,
    make_cached,
    make_output,
    make_plan,
    make_spec,
    true_record,
    with_least,
)

Columns = dict[str, Tensor]
GRID = GridSettings(compressor="dart", layer=2, ratios=(0.5,))
SPECS: dict[str, dict[str, Any]] = {
    "exact": {"records": "topk+sketch"},
    "least": {"records": "topk", "least_logits": True},
    "codes": {
        "records": "topk",
        "logits_codec": "affine8",
        "logits_max_error": 1.0,
        "affinity_dtype": "int8",
        "affinity_max_error": 1.0,
    },
    "mass": {"records": "topk", "top_k": VOCAB_SIZE, "top_p": 0.9, "min_k": 2},
    "states": {
        "records": "hidden",
        "hidden_dtype": "int8",
        "hidden_group": 4,
        "hidden_max_error": 0.1,
    },
    "grid": {"records": "topk", "grid": GRID},
}


def cut(logits: Tensor, spec: CacheSpec) -> list[int]:
    """How many entries each position keeps, by a plain loop."""
    counts: list[int] = []
    for row in logits:
        held, kept = 0.0, 0
        for share in row.double().softmax(0).sort(descending=True).values.tolist():
            if kept >= (spec.min_k or 1) and held >= (spec.top_p or 1):
                break
            held, kept = held + share, kept + 1
        counts.append(kept)
    return counts


def honest_row(number: int, spec: CacheSpec, dtype: torch.dtype = torch.float32) -> CachedSample:
    """A row of a made-up teacher whose numbers keep every promise of the spec."""
    cached = make_cached(number, spec.records)
    output = make_output(spec.records, number, ratios=spec.ratios, num_text=9, dtype=dtype)
    if spec.affinity_dtype == "int8" and output.affinity is not None:  # coded from float32
        cosine = AffinityRecord(cosine=output.affinity.cosine.float())
        output = dataclasses.replace(output, affinity=cosine)
    if spec.least_logits:
        output = with_least(output, number)
    if spec.top_p is not None:
        generator = torch.Generator().manual_seed(number)
        changes: dict[str, Any] = {}
        for name in ("vision", "response"):
            num_rows = len(getattr(output, name).ids)
            logits = (torch.randn(num_rows, VOCAB_SIZE, generator=generator) * 3).to(dtype)
            record = true_record(logits, cut(logits, spec))
            changes[name] = dataclasses.replace(record, log_least=None)
        output = dataclasses.replace(output, **changes)
    return CachedSample(sample=cached.sample, output=output)


def forged(folder: Path, spec: CacheSpec, bend: Callable[[Columns], object]) -> tuple[str, str]:
    """A sealed cache whose second row has its columns bent; the keys of both rows."""
    rows = [honest_row(number, spec) for number in (0, 1)]
    encoded = [encode_row(row, spec) for row in rows]
    columns = {name: decode_frame(frame).clone() for name, frame in encoded[1].frames.items()}
    bend(columns)
    encoded[1] = dataclasses.replace(encoded[1], frames=encode_columns(columns))
    return sealed(folder, spec, rows, encoded)


def sealed(
    folder: Path, spec: CacheSpec, rows: list[CachedSample], encoded: list[EncodedRow]
) -> tuple[str, str]:
    store = LocalStore(folder)
    plan = write_plan(store, make_plan([rows], spec))
    write_assets(store, TeacherAssets())
    write_encoded_shard(store, plan, 0, encoded)
    seal_cache(store)
    return rows[0].sample.key, rows[1].sample.key


def put(name: str, value: float, *at: int) -> Callable[[Columns], object]:
    """Set one number of a column, at its first position unless `at` says which."""

    def bend(columns: Columns) -> None:
        columns[name].reshape(-1)[at[0] if at else 0] = value

    return bend


def add(name: str, amount: float) -> Callable[[Columns], object]:
    def bend(columns: Columns) -> None:
        columns[name] += amount

    return bend


def recast(name: str, dtype: torch.dtype) -> Callable[[Columns], object]:
    def bend(columns: Columns) -> None:
        columns[name] = columns[name].to(dtype)

    return bend


def fill(name: str, value: float) -> Callable[[Columns], object]:
    return lambda columns: columns[name].fill_(value)


def less_tail(columns: Columns) -> None:
    columns["v_tail"][columns["v_tail"].argmax()] = -80


def equal_ids(columns: Columns) -> None:
    columns["v_ids"][:] = columns["v_ids"][:, :1]


def unsorted(columns: Columns) -> None:
    columns["r_logits"] = columns["r_logits"].flip(1)
    columns["r_ids"] = columns["r_ids"].flip(1)


def swapped_ties(columns: Columns) -> None:
    columns["v_logits"][0, 1] = columns["v_logits"][0, 0]
    columns["v_ids"][0, :2] = columns["v_ids"][0, :2].sort(descending=True).values


def wider(name: str) -> Callable[[Columns], object]:
    def bend(columns: Columns) -> None:
        columns[name] = torch.cat([columns[name], columns[name]], dim=-1)

    return bend


def one_more(columns: Columns) -> None:
    """Position 0 of the response keeps an entry more than it needs."""
    columns["r_counts"][:] = VOCAB_SIZE
    rows, spread = len(columns["r_counts"]), torch.arange(VOCAB_SIZE)
    logits = torch.zeros(rows, VOCAB_SIZE)
    columns["r_ids"] = spread.repeat(rows, 1).T.reshape(-1).to(torch.int32)
    columns["r_logits"] = logits.T.reshape(-1).contiguous()
    columns["r_lse"][:] = torch.tensor(VOCAB_SIZE).log()
    columns["r_tail"][:] = -torch.inf


def one_view_twice(columns: Columns) -> None:
    columns["views"] = torch.tensor([[0, 0, 1, 2], [0, 0, 1, 2]], dtype=torch.int32)


FORGERIES: list[tuple[str, str, Callable[[Columns], object], str]] = [
    ("equal ids", "exact", equal_ids, "v_ids: .*distinct"),
    ("one id twice", "exact", lambda c: c["r_ids"][0, 1:2].copy_(c["r_ids"][0, :1]), "r_ids"),
    ("an id beyond the vocabulary", "exact", put("v_ids", VOCAB_SIZE), "token ids span"),
    ("lse less", "exact", add("v_lse", -100), "v_lse, tail: .*mass of 1"),
    ("lse more", "exact", add("r_lse", 100), "r_lse, tail: .*mass of 1"),
    ("lse a little less", "exact", add("v_lse", -0.001), "v_lse, tail: .*mass of 1"),
    ("tail more", "exact", add("v_tail", 5), "v_lse, tail: .*mass of 1"),
    ("tail very much more", "exact", add("v_tail", 1e4), "v_lse, tail: .*mass of 1"),
    ("tail less", "exact", less_tail, "v_lse, tail: .*mass of 1"),
    ("a cosine of 1000", "exact", put("a_cosine", 1000), "a_cosine: .*1000.*cosines in"),
    ("a cosine above 1", "exact", put("a_cosine", 1.001), "a_cosine: .*cosines in"),
    ("content id -1", "exact", put("content_ids", -1), "content_ids: .*vocabulary row"),
    ("content id 2^62", "exact", put("content_ids", 2**62), "content_ids: .*vocabulary row"),
    ("content ids V", "exact", put("content_ids", VOCAB_SIZE), "content_ids: .*vocabulary row"),
    ("content ids all 5", "exact", fill("content_ids", 5), "content_ids has 5 alone"),
    ("float ids", "exact", recast("v_ids", torch.float32), "v_ids is torch.float32"),
    ("long ids", "exact", recast("r_ids", torch.int64), "r_ids is torch.int64"),
    ("int8 logits", "exact", recast("v_logits", torch.int8), "v_logits is torch.int8"),
    ("half logits", "exact", recast("r_logits", torch.float16), "r_logits is torch.float16"),
    ("half lse", "exact", recast("v_lse", torch.float16), "v_lse is torch.float16"),
    ("int content", "exact", recast("content_ids", torch.int32), "content_ids is torch.int32"),
    ("double cosines", "exact", recast("a_cosine", torch.float64), "a_cosine is torch.float64"),
    ("unsorted logits", "exact", unsorted, "r_logits: .*descending"),
    ("ties by larger id", "exact", swapped_ties, "v_logits: .*ties by smaller id"),
    ("unknown flags", "exact", put("content_flags", 4), "content_flags: .*bits 0 and 1"),
    ("a view twice", "exact", one_view_twice, "names a view twice"),
    ("another image's view", "exact", put("views", 1), "more images than the 1"),
    ("too many entries", "exact", wider("v_ids"), "v_ids has shape .4, 8."),
    ("sketch code -128", "exact", put("s_codes", -128), "s_codes: .*-127"),
    ("a wider sketch", "exact", wider("s_codes"), r"s_codes has shape \[4, 6\]"),
    ("more scales", "exact", wider("s_scale"), r"s_scale has shape \[8\]"),
    ("a negative scale", "exact", put("s_scale", -1), "s_scale: .*at least 0"),
    ("least too large", "least", fill("v_least", -0.001), "v_least: .*no more than any"),
    ("least above 0", "least", fill("v_least", 1), "log_least"),
    ("least of floats", "least", recast("r_least", torch.float32), "r_least is torch.float32"),
    ("high above", "codes", add("v_high", 3), "v_lse, tail|v_high"),
    (
        "low and high swapped",
        "codes",
        lambda c: c.update(r_low=c["r_high"], r_high=c["r_low"]),
        "r_",
    ),
    ("codes from 1", "codes", lambda c: c["v_codes"].clamp_(min=1), "v_low: .*last kept"),
    ("codes to 254", "codes", lambda c: c["v_codes"].clamp_(max=254), "v_high: .*first"),
    ("signed codes", "codes", recast("v_codes", torch.int16), "v_codes is torch.int16"),
    ("a cosine's end above 1", "codes", fill("a_high", 1.5), "a_high: .*cosines in"),
    ("a cosine's codes from 1", "codes", lambda c: c["a_codes"].clamp_(min=1), "a_codes: .*255"),
    ("more than top_p needs", "mass", one_more, "r_counts: .*fewest entries that hold 0.9"),
    ("state code -128", "states", put("h_text", -128), "h_text: .*-127"),
    ("a state's scale below 0", "states", put("h_vision_scale", -1), "h_vision_scale: .*least 0"),
    ("wide states", "states", recast("h_predicting", torch.int16), "h_predicting is torch.int16"),
    ("lse of a grid", "grid", add("g1_lse", -1), "g1_lse, tail: .*mass of 1"),
    ("ids of a grid", "grid", lambda c: c["g1_ids"].fill_(3), "g1_ids: .*distinct"),
]


@pytest.mark.parametrize(
    ("name", "bend", "expected"), [each[1:] for each in FORGERIES], ids=[f[0] for f in FORGERIES]
)
def test_a_forged_number_is_found_with_file_and_sample(
    name: str, bend: Callable[[Columns], object], expected: str, tmp_path: Path
) -> None:
    honest, bent = forged(tmp_path, make_spec(**SPECS[name]), bend)
    problems = verify_cache(tmp_path, num_threads=1).problems
    (file,) = (tmp_path / "shards").iterdir()
    assert problems
    assert all(file.name in problem and bent in problem for problem in problems)
    assert not any(honest in problem for problem in problems)
    assert any(re.search(expected, problem) for problem in problems), problems


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", SPECS)
def test_honest_numbers_pass(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"logits_dtype": str(dtype).removeprefix("torch.")}
    if "affinity_dtype" not in SPECS[name]:
        changes["affinity_dtype"] = changes["logits_dtype"]
    spec = make_spec(**{**SPECS[name], **changes})
    rows = [honest_row(number, spec, dtype) for number in range(20)]
    build(tmp_path, [rows], spec=spec)
    assert verify_cache(tmp_path, num_threads=1).problems == ()


def test_a_template_whose_shares_do_not_sum_to_one_is_found(tmp_path: Path) -> None:
    for number, (shift, found) in enumerate(((0.0, 0), (0.01, 1))):
        shares = torch.full((VOCAB_SIZE,), shift - math.log(VOCAB_SIZE))
        template = TailTemplate(vision=shares)
        spec = make_spec(template_digest=template.digest)
        folder = tmp_path / str(number)
        build(folder, [[honest_row(0, spec)]], spec=spec, template=template)
        problems = verify_cache(folder, num_threads=1).problems
        assert len(problems) == found
        assert all("template.safetensors: vision has shares" in each for each in problems)


def test_a_commit_record_that_counts_other_tokens_is_found(tmp_path: Path) -> None:
    seal = build(tmp_path, [[honest_row(0, make_spec())]])
    count = seal.shards[0].num_vision_tokens
    for file in ("commits/00000.json", "SEALED.json"):
        edit_record(tmp_path / file, f'"num_vision_tokens": {count}', '"num_vision_tokens": 99')
    (problem,) = verify_cache(tmp_path, num_threads=1).problems
    assert f"num_vision_tokens 99, its rows have {count}" in problem


@pytest.mark.parametrize(
    ("ids", "text", "same"),
    [
        ([5, 5, 5], "what is it? a square", False),
        ([5, 5], "Ha ha", True),
        ([5, 5, 5], "no no no", True),
        ([5, 5], "ab", False),
        ([5], "what is it?", True),
        ([5, 6], "what is it?", True),
        ([], "", True),
    ],
)
def test_equal_ids_stand_for_text_that_repeats(ids: list[int], text: str, same: bool) -> None:
    assert same_text(ids, text) == same
