"""Promises of the stream: a fixed, resumable, elastic order; checked samples; loud threads."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import ObjectiveName, preset
from student_train.data.batch_plan import BatchPlan, micro_batch
from student_train.data.same_text import check_against_teacher
from student_train.data.stream import (
    READ_AHEAD,
    StudentBatch,
    TrainingStream,
    parts_needed,
)
from teacher_cache.codec.columns import columns_of
from teacher_cache.codec.frames import decode_frame
from teacher_cache.encoding.collate import EncodedSample
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.errors import CacheMismatchError, SampleError
from teacher_cache.schema.options import RecordSettings
from teacher_cache.schema.samples import Sample, ViewGrid
from teacher_cache.schema.teacher_output import TeacherOutput
from teacher_cache.shards import rows
from teacher_cache.teacher.teacher import Teacher
from tests.support.caches import build_cache
from tests.support.deep import made_up_sample
from tests.support.epic import text_output
from tests.support.runs import stream_of
from tests.support.tiny import tiny_samples

NUM_SAMPLES = 11
PAIRS = RecordSettings(records="topk+sketch", top_k=8, sketch_rank=4)


@pytest.fixture(scope="module")
def teacher(llava: Path) -> Teacher:
    return Teacher.load(str(llava), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def reader(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    cache = tmp_path_factory.mktemp("stream") / "cache"
    return build_cache(cache, teacher, tiny_samples(NUM_SAMPLES), PAIRS, samples_per_shard=3)


def keys(batches: Iterator[StudentBatch], num_batches: int) -> list[str]:
    taken = islice(batches, num_batches)
    return [sample.key for batch in taken for sample in batch.model.samples]


@settings(deadline=None)
@given(
    ways=st.integers(1, 6),
    micro=st.integers(1, 5),
    steps=st.integers(1, 3),
    first=st.integers(0, 9),
)
def test_ranks_and_micro_batches_partition_every_step(
    ways: int, micro: int, steps: int, first: int
) -> None:
    batch_size = ways * micro * steps
    taken: list[int] = []
    for rank in range(ways):
        plan = BatchPlan(batch_size=batch_size, micro_batch_size=micro, rank=rank, world_size=ways)
        assert plan.accumulation_steps == steps
        chunks = list(islice(plan.positions(first * batch_size), steps))
        assert all(len(chunk) == micro for chunk in chunks)
        taken += [position for chunk in chunks for position in chunk]
    assert taken == list(range(first * batch_size, (first + 1) * batch_size))


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize(("micro", "world_size"), [(4, 1), (1, 1), (2, 2), (1, 4)])
def test_micro_batches_workers_and_threads_do_not_change_what_forms_a_step(
    reader: CacheReader, teacher: Teacher, micro: int, world_size: int, num_threads: int
) -> None:
    expected = keys(iter(stream_of(reader, teacher.encoder.encode)), 8)
    streams = [
        iter(
            stream_of(
                reader,
                teacher.encoder.encode,
                micro_batch_size=micro,
                rank=rank,
                world_size=world_size,
                num_threads=num_threads,
            )
        )
        for rank in range(world_size)
    ]
    per_step = 4 // (micro * world_size)
    found = [key for _ in range(4) for ranked in streams for key in keys(ranked, per_step)]
    assert found == expected


def test_every_epoch_is_another_permutation_and_every_seed_another_order(
    reader: CacheReader, teacher: Teacher
) -> None:
    order = keys(iter(stream_of(reader, teacher.encoder.encode, micro_batch_size=4)), 6)
    first, second = order[:NUM_SAMPLES], order[NUM_SAMPLES : 2 * NUM_SAMPLES]
    assert sorted(first) == sorted(second) == sorted(reader.keys)
    assert first != second
    other = keys(iter(stream_of(reader, teacher.encoder.encode, seed=1, micro_batch_size=4)), 6)
    assert other != order


def test_a_stream_resumes_at_every_step(reader: CacheReader, teacher: Teacher) -> None:
    whole = keys(iter(stream_of(reader, teacher.encoder.encode)), 14)
    for position in range(0, 28, 4):
        resumed = stream_of(reader, teacher.encoder.encode)
        resumed.seek(stream_of(reader, teacher.encoder.encode).state(position))
        assert keys(iter(resumed), 14 - position // 2) == whole[position:]


def test_a_foreign_state_is_refused_with_the_field(reader: CacheReader, teacher: Teacher) -> None:
    stream = stream_of(reader, teacher.encoder.encode)
    for field, value in {"cache": "0" * 64, "seed": 5, "batch_size": 8, "order_version": 0}.items():
        with pytest.raises(CacheMismatchError, match=f"{field}: stored"):
            stream.seek(replace(stream.state(8), **{field: value}))
    assert stream.position == 0


def test_a_stream_without_some_samples_is_known_by_them(
    reader: CacheReader, teacher: Teacher
) -> None:
    def stream(*skipped: int) -> TrainingStream:
        plan = BatchPlan(batch_size=4, micro_batch_size=2)
        return TrainingStream(
            reader,
            teacher.encoder.encode,
            objective=preset("supervised"),
            tier="topk+sketch",
            pad_token_id=0,
            seed=0,
            plan=plan,
            skipped=skipped,
        )

    assert stream(2, 7).num_rows == NUM_SAMPLES - 2
    epoch = keys(iter(stream(2, 7)), 18)[: NUM_SAMPLES - 2]
    assert sorted(epoch) == sorted(k for i, k in enumerate(reader.keys) if i not in (2, 7))
    stream(7, 2).seek(stream(2, 7).state(4))
    for other in (stream(2), stream(2, 8), stream()):
        with pytest.raises(CacheMismatchError, match="skipped"):
            other.seek(stream(2, 7).state(4))


def test_the_default_micro_batch_is_the_largest_that_cuts_a_share_evenly() -> None:
    found = {(4, 1): 4, (32, 1): 8, (12, 1): 6, (11, 1): 1, (7, 1): 7, (32, 8): 4, (1, 1): 1}
    assert {(size, ways): micro_batch(size, ways) for size, ways in found} == found
    for size, ways in product(range(1, 65), range(1, 9)):
        if size % ways == 0:
            chosen = micro_batch(size, ways)
            BatchPlan(batch_size=size, micro_batch_size=chosen, world_size=ways)
            share = size // ways
            assert chosen == max(each for each in range(1, 9) if share % each == 0)


def test_uneven_micro_batches_and_positions_inside_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match="choose a micro_batch_size that divides 3"):
        BatchPlan(batch_size=6, micro_batch_size=2, world_size=2)
    for size, ways in product(range(1, 41), range(2, 9)):
        if size % ways:
            with pytest.raises(ValueError, match="is not a multiple of"):
                BatchPlan(batch_size=size, micro_batch_size=1, world_size=ways)
    with pytest.raises(ValueError, match="rank 2 of 2 workers"):
        BatchPlan(batch_size=4, micro_batch_size=2, rank=2, world_size=2)
    plan = BatchPlan(batch_size=4, micro_batch_size=2)
    with pytest.raises(ValueError, match="position 2 is not a multiple"):
        next(plan.positions(2))


def test_only_needed_parts_are_read(reader: CacheReader, teacher: Teacher) -> None:
    assert parts_needed(preset("supervised"), "hidden") == frozenset()
    assert parts_needed(preset("rld"), "hidden") == {"hidden"}
    assert parts_needed(preset("rld"), "topk+sketch") == {"response"}
    assert parts_needed(preset("emkd"), "topk") == {"vision", "affinity", "response"}
    only_vsd = replace(preset("emkd"), rld_weight=0.0, vlad_weight=0.0)
    assert parts_needed(only_vsd, "topk+sketch") == {"vision", "sketch"}
    batch = next(iter(stream_of(reader, teacher.encoder.encode, objective=preset("rld"))))
    for output in batch.outputs:
        assert output.response is not None
        assert output.vision is output.sketch is output.affinity is output.hidden is None


@pytest.mark.parametrize("name", ["supervised", "rld", "emkd"])
def test_frames_that_the_objective_does_not_need_are_not_even_decompressed(
    reader: CacheReader, teacher: Teacher, name: ObjectiveName, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []

    def counting(frame: bytes) -> Tensor:
        decoded.append(frame)
        return decode_frame(frame)

    monkeypatch.setattr(rows, "decode_frame", counting)
    objective = preset(name)
    stream = stream_of(reader, teacher.encoder.encode, objective=objective, batch_size=2)
    batch = next(iter(stream))
    needed = columns_of(parts_needed(objective, "topk+sketch"), reader.spec)
    assert len(decoded) == len(needed) * len(batch.outputs)
    assert len(needed) == {"supervised": 3, "rld": 8, "emkd": 17}[name]


def test_an_error_in_a_thread_is_raised_where_its_sample_is_due(
    reader: CacheReader, teacher: Teacher
) -> None:
    order = keys(iter(stream_of(reader, teacher.encoder.encode)), 5)
    for num_threads in (0, 1, 3):

        def encode(sample: Sample) -> EncodedSample:
            if sample.key == order[7]:
                raise SampleError(sample.source_id, "cannot be decoded")
            return teacher.encoder.encode(sample)

        batches = iter(stream_of(reader, encode, num_threads=num_threads))
        assert keys(batches, 3) == order[:6]
        with pytest.raises(SampleError, match="cannot be decoded"):
            next(batches)


def test_threads_read_ahead_within_bounds_and_end_with_the_iterator(
    reader: CacheReader, teacher: Teacher
) -> None:
    encoded: list[str] = []

    def encode(sample: Sample) -> EncodedSample:
        encoded.append(sample.key)
        return teacher.encoder.encode(sample)

    batches = stream_of(reader, encode, num_threads=2).__iter__()
    for num_consumed in range(2, 11, 2):
        next(batches)
        assert num_consumed <= len(encoded) <= num_consumed + READ_AHEAD * 2
    threads = [t for t in threading.enumerate() if t.name.startswith("read-ahead")]
    assert threads
    del batches  # what leaving the training loop does
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()


def encoded_and_output() -> tuple[EncodedSample, TeacherOutput]:
    """Three vision tokens, and four of text whose ids are 5, 6, 7 and 8."""
    encoded = made_up_sample(9, [0, 1, 2], [5, 6], [7, 8], "photo-7")
    return encoded, text_output(encoded.spans)


def test_a_student_that_splits_the_text_otherwise_is_refused_by_name() -> None:
    encoded, output = encoded_and_output()
    check_against_teacher(encoded, output, "view")
    other = replace(output, content_ids=torch.tensor([5, 9, 7, 8]))
    with pytest.raises(SampleError, match=r"'photo-7': .* from token 1 on found ids \[6, 7, 8\]"):
        check_against_teacher(encoded, other, "view")
    longer = replace(
        output,
        content_ids=torch.tensor([5, 6, 7, 8, 9]),
        is_response=torch.tensor([False, False, True, True, True]),
        after_image=torch.ones(5, dtype=torch.bool),
    )
    with pytest.raises(SampleError, match=r"gives 4 text tokens, the teacher's gave 5"):
        check_against_teacher(encoded, longer, "view")
    for field in ("is_response", "after_image"):
        turned = replace(output, **{field: getattr(output, field).logical_not()})
        with pytest.raises(SampleError, match=f"differ in which of them are {field}"):
            check_against_teacher(encoded, turned, "view")


def test_views_must_correspond_as_far_as_the_matching_needs() -> None:
    encoded, output = encoded_and_output()
    one_view = (ViewGrid(image=0, view=0, rows=3, cols=3),)
    check_against_teacher(encoded, replace(output, views=one_view), "global")
    check_against_teacher(encoded, replace(output, views=one_view), None)
    with pytest.raises(SampleError, match="scope `global`"):
        check_against_teacher(encoded, replace(output, views=one_view), "view")
    no_view = replace(output, views=())
    with pytest.raises(SampleError, match="the student sees 1 images, the teacher saw 0"):
        check_against_teacher(encoded, no_view, None)
