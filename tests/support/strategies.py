"""Hypothesis strategies, makers and comparisons of samples, teacher outputs, specs and plans.

Values cover what records allow: empty axes, every dtype, -0.0, subnormals; -inf as the log tail
where all of the vocabulary is kept. Random numbers come from a drawn seed, so that shrinking works
on sizes and not on floats.
"""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from teacher_cache.codec.columns import output_columns, parts_in
from teacher_cache.schema.fingerprint import tensor_bytes
from teacher_cache.schema.manifest import LAYOUT_VERSION, CacheSpec, Plan
from teacher_cache.schema.options import RecordKind, ShardFormatName, holds
from teacher_cache.schema.samples import IMAGE_PLACEHOLDER, Message, Sample, ViewGrid, make_sample
from teacher_cache.schema.teacher_output import (
    AffinityRecord,
    CachedSample,
    HiddenRecord,
    SketchRecord,
    TeacherOutput,
    TopKRecord,
)

BEARTYPE_DRAWS = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strat")
"""Mark of the tests that use these strategies: beartype picks the item of a tuple that it checks
with `random`, which Hypothesis takes for a draw of ours."""

TIERS: tuple[RecordKind, ...] = ("topk", "topk+sketch", "hidden")
VOCAB_SIZE = 11
WIDTH = 6
RANK = 3
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def make_spec(records: RecordKind = "topk", **changes: object) -> CacheSpec:
    """A spec of a made-up teacher; `changes` replace its fields."""
    fields: dict[str, object] = {
        "layout_version": LAYOUT_VERSION,
        "records": records,
        "top_k": 4 if holds(records, "topk") else None,
        "top_p": None,
        "min_k": None,
        "sketch_rank": RANK if holds(records, "sketch") else None,
        "sketch_digest": None,
        "head_digest": None,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": WIDTH,
        "logits_dtype": "float32",
        "logits_codec": "exact" if holds(records, "topk") else None,
        "logits_max_error": None,
        "hidden_group": None,
        "hidden_max_error": None,
        "affinity_max_error": None,
        "hidden_dtype": "float32" if holds(records, "hidden") else None,
        "affinity_dtype": "float32",
        "teacher_class": "Teacher",
        "teacher_weights": "1" * 64,
        "teacher_config": "2" * 64,
        "compute_dtype": "float32",
        "attention": "sdpa",
        "tokenizer": "3" * 64,
        "vocabulary": "6" * 64,
        "chat_template": "4" * 64,
        "image_processor": "5" * 64,
        "system_prompt": None,
        "batch_size": 1,
        "share_vision": True,
    }
    return CacheSpec(**{**fields, **changes})  # pyright: ignore[reportArgumentType]


def make_plan(
    shards: Sequence[Sequence[CachedSample]],
    spec: CacheSpec | None = None,
    form: ShardFormatName = "arrow",
) -> Plan:
    """The plan of a cache that holds these samples, shard by shard."""
    keys = [[cached.sample.key for cached in shard] for shard in shards]
    return Plan(
        spec=spec or make_spec(),
        format=form,
        source="made-up",
        shards=tuple(tuple((key, n) for n, key in enumerate(shard)) for shard in keys),
    )


def _floats(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    values = torch.randn(shape, generator=generator) * 10
    values[torch.rand(shape, generator=generator) < 0.1] = -0.0
    values[torch.rand(shape, generator=generator) < 0.1] = 1e-40  # subnormal or zero
    return values.to(dtype)


def _top_k(
    generator: torch.Generator,
    dtype: torch.dtype,
    num_rows: int,
    num_kept: int,
    ragged: bool = False,
) -> TopKRecord:
    logits = _floats(generator, dtype, num_rows, VOCAB_SIZE)
    counts = torch.full((num_rows,), num_kept)
    if ragged:
        counts = torch.randint(1, num_kept + 1, (num_rows,), generator=generator)
    record = true_record(logits, counts.tolist(), num_kept)
    return dataclasses.replace(record, num_kept=record.num_kept if ragged else None, log_least=None)


def _repeat_first(values: Tensor, counts: Tensor) -> Tensor:
    """Row i's entries from `counts[i]` on replaced by its first one."""
    return values.where(torch.arange(values.shape[1]) < counts[:, None], values[:, :1])


def true_record(logits: Tensor, counts: Sequence[int], width: int | None = None) -> TopKRecord:
    """The record of `logits` in which row i keeps `counts[i]` entries.

    K is `width`, or else the largest count.
    """
    order = logits.sort(dim=1, descending=True, stable=True).indices
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logsumexp = wide.logsumexp(dim=1)
    log_tail = torch.empty_like(logsumexp)
    for row, num_kept in enumerate(counts):
        log_tail[row] = wide[row, order[row, num_kept:]].logsumexp(0) - logsumexp[row]
    ids = order[:, : width or max(counts, default=1)]
    num_kept = torch.tensor(counts, dtype=torch.int64)
    return TopKRecord(
        ids=_repeat_first(ids, num_kept).to(torch.int32),
        logits=_repeat_first(logits.gather(1, ids), num_kept),
        logsumexp=logsumexp,
        log_tail=log_tail,
        vocab_size=logits.shape[1],
        num_kept=num_kept,
        log_least=((wide.amin(dim=1) - logsumexp) * 1.01).half(),  # somewhat below the least
    )


def make_output(
    records: RecordKind,
    seed: int,
    views: Sequence[tuple[int, int]] = ((2, 2),),
    num_text: int = 5,
    num_kept: int = 4,
    dtype: torch.dtype = torch.float32,
    ragged: bool = False,
    ratios: Sequence[float] = (),
) -> TeacherOutput:
    """An output with a made-up teacher's numbers for the given grids and number of content tokens.

    `ragged`: positions keep 1..`num_kept` entries, each its own number. `ratios` are those of the
    teacher's grid.
    """
    generator = torch.Generator().manual_seed(seed)
    num_vision = sum(rows * cols for rows, cols in views)
    is_response = torch.rand(num_text, generator=generator) < 0.5
    first_after = int(torch.randint(0, num_text + 1, (), generator=generator))
    after_image = (torch.arange(num_text) >= first_after) & bool(views)
    num_response, num_after = int(is_response.sum()), int(after_image.sum())
    hidden = vision = sketch = affinity = response = None
    if holds(records, "hidden"):
        hidden = HiddenRecord(
            vision=_floats(generator, dtype, num_vision, WIDTH),
            text=_floats(generator, dtype, num_after, WIDTH),
            predicting=_floats(generator, dtype, num_response, WIDTH),
        )
    if holds(records, "topk"):
        vision = _top_k(generator, dtype, num_vision, num_kept, ragged)
        cosine = (_floats(generator, dtype, num_after, num_vision) / 20).clamp(-1, 1)
        affinity = AffinityRecord(cosine=cosine)
        response = _top_k(generator, dtype, num_response, num_kept, ragged)
    if holds(records, "sketch"):
        codes = torch.randint(-127, 128, (num_vision, RANK), generator=generator)
        sketch = SketchRecord(
            codes=codes.to(torch.int8),
            scale=_floats(generator, torch.float32, num_vision).abs(),
            tail_shift=_floats(generator, torch.float32, num_vision),
        )
    apart = torch.Generator().manual_seed(seed)  # so that other numbers do not depend on the grid
    grid = {r: _top_k(apart, dtype, num_response, num_kept, ragged) for r in ratios}
    states = {r: _floats(apart, dtype, num_response, WIDTH) for r in ratios}
    return TeacherOutput(
        views=tuple(
            ViewGrid(image=n, view=0, rows=rows, cols=cols) for n, (rows, cols) in enumerate(views)
        ),
        content_ids=torch.randint(0, VOCAB_SIZE, (num_text,), generator=generator),
        is_response=is_response,
        after_image=after_image,
        vision=vision,
        sketch=sketch,
        affinity=affinity,
        response=response,
        hidden=hidden,
        response_grid=grid if ratios and response is not None else None,
        hidden_grid=states if ratios and hidden is not None else None,
    )


def with_least(output: TeacherOutput, seed: int) -> TeacherOutput:
    """The output with least probabilities in its top-k records, one of them beyond float16."""
    generator = torch.Generator().manual_seed(seed)

    def floored(record: TopKRecord | None) -> TopKRecord | None:
        if record is None:
            return None
        below = 30 * torch.rand(len(record.ids), generator=generator)
        smallest = record.logits.float().amin(dim=1) - record.logsumexp
        outside = (VOCAB_SIZE - record.counts).log()  # their mean is no less than the least
        mean = (record.log_tail - outside).where(outside.isfinite(), 0.0)
        least = (torch.minimum(smallest, mean) - below - 0.1).to(torch.float16)
        least[:1] = -torch.inf
        return dataclasses.replace(record, log_least=least)

    vision, response = floored(output.vision), floored(output.response)
    return dataclasses.replace(output, vision=vision, response=response)


def make_cached(number: int, records: RecordKind = "topk") -> CachedSample:
    """The `number`th of a row of small samples that differ from one another."""
    image = b"\x89PNG" + bytes([number % 256]) * (10 + number)
    messages = (
        Message(role="user", text=f"{IMAGE_PLACEHOLDER} what is {number}?"),
        Message(role="assistant", text=f"it is {number}"),
    )
    return CachedSample(
        sample=make_sample(f"sample-{number}", [image], messages),
        output=make_output(records, number),
    )


def asked_again(owner: CachedSample, number: int, records: RecordKind = "topk") -> CachedSample:
    """Another question about the same images; the vision record is that of `owner`."""
    shown, ours = owner.output, make_output(records, number, num_text=number % 4 + 2)
    text = IMAGE_PLACEHOLDER * len(owner.sample.images) + f" again, {number}?"
    messages = (Message(role="user", text=text), Message(role="assistant", text="no"))
    num_vision = sum(view.num_tokens for view in shown.views)
    hidden, affinity = ours.hidden, ours.affinity
    if hidden is not None and shown.hidden is not None:
        hidden = dataclasses.replace(hidden, vision=shown.hidden.vision)
    if affinity is not None:
        cosine = torch.full((len(affinity.cosine), num_vision), 1 / (number + 1))
        affinity = AffinityRecord(cosine=cosine)
    output = dataclasses.replace(
        ours,
        views=shown.views,
        vision=shown.vision,
        sketch=shown.sketch,
        affinity=affinity,
        hidden=hidden,
        shared_from=owner.sample.key,
    )
    return CachedSample(
        sample=make_sample(f"again-{number}", owner.sample.images, messages), output=output
    )


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Any sample: several turns, several images or none, any text."""
    images: list[bytes] = []
    messages: list[Message] = []
    texts = st.text(max_size=20).filter(lambda text: IMAGE_PLACEHOLDER not in text)
    if draw(st.booleans()):
        messages.append(Message(role="system", text=draw(texts)))
    for _ in range(draw(st.integers(1, 3))):
        shown = draw(st.lists(st.binary(max_size=30), max_size=2))
        images += shown
        messages.append(Message(role="user", text=IMAGE_PLACEHOLDER * len(shown) + draw(texts)))
        messages.append(Message(role="assistant", text=draw(texts)))
    return make_sample(draw(st.text(max_size=10)), images, messages)


@st.composite
def ragged_top_k_records(draw: st.DrawFn) -> TopKRecord:
    """Any record whose positions keep different numbers of entries, up to the whole vocabulary.

    No position, or all of one count, are among them; the numbers are no teacher's (`true_record`
    makes those).
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(FLOATS))
    num_rows, num_kept = draw(st.integers(0, 8)), draw(st.integers(1, VOCAB_SIZE))
    return _top_k(generator, dtype, num_rows, num_kept, ragged=True)


@st.composite
def teacher_outputs(draw: st.DrawFn, records: RecordKind, ragged: bool = False) -> TeacherOutput:
    """Any output of a tier; `ragged` ones keep another number of entries at each position."""
    sides = st.integers(1, 4)
    return make_output(
        records,
        draw(st.integers(0, 2**32 - 1)),
        views=draw(st.lists(st.tuples(sides, sides), max_size=3)),
        num_text=draw(st.integers(0, 8)),
        num_kept=draw(st.integers(1, VOCAB_SIZE)),
        dtype=draw(st.sampled_from(FLOATS)),
        ragged=ragged,
    )


@st.composite
def cached_samples(draw: st.DrawFn, records: RecordKind) -> CachedSample:
    """Any row of a cache of a tier."""
    return CachedSample(sample=draw(samples()), output=draw(teacher_outputs(records)))


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    assert tensor_bytes(left) == tensor_bytes(right)


def assert_same_outputs(left: TeacherOutput, right: TeacherOutput) -> None:
    assert (left.views, left.shared_from) == (right.views, right.shared_from)
    assert parts_in(left) == parts_in(right)
    here, there = output_columns(left), output_columns(right)
    assert here.keys() == there.keys()
    for name, values in here.items():
        assert_same_bits(values, there[name])


def assert_same(left: CachedSample, right: CachedSample) -> None:
    assert left.sample == right.sample
    assert_same_outputs(left.output, right.output)
