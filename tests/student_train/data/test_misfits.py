"""Promises of misfits.py: each misfit has its cause, confirmed, and messages count causes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from student_train.config.objective import MatchScope
from student_train.data.misfits import (
    NUM_CAUSES,
    StudentLimits,
    describe_misfits,
    find_misfits,
    why_unusable,
)
from teacher_cache.encoding.collate import EncodedSample
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.options import RecordSettings
from teacher_cache.schema.samples import RejectedSample, Sample, TokenSpans
from teacher_cache.teacher.teacher import Teacher
from tests.support.caches import build_cache
from tests.support.tiny import tiny_samples

NUM_SAMPLES = 5


@pytest.fixture(scope="module")
def teacher(llava: Path) -> Teacher:
    return Teacher.load(str(llava), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def reader(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    cache = tmp_path_factory.mktemp("misfits") / "cache"
    settings = RecordSettings(records="topk", top_k=8)
    return build_cache(cache, teacher, tiny_samples(NUM_SAMPLES), settings)


def limits(scope: MatchScope | None = "view", embeddings: int = 384) -> StudentLimits:
    return StudentLimits(scope=scope, num_embeddings=embeddings, num_rows=embeddings)


def changed(
    teacher: Teacher, number: int, change: Callable[[TokenSpans], TokenSpans]
) -> Callable[[Sample], EncodedSample]:
    """The teacher's encoder, with the spans of one sample changed."""

    def encode(sample: Sample) -> EncodedSample:
        encoded = teacher.encoder.encode(sample)
        if sample.source_id != f"tiny-{number}":
            return encoded
        return replace(encoded, spans=change(encoded.spans))

    return encode


def other_ids(spans: TokenSpans) -> TokenSpans:
    return replace(spans, content_ids=spans.content_ids + 1)


def other_roles(spans: TokenSpans) -> TokenSpans:
    is_response = spans.is_response.clone()
    is_response[0] = ~is_response[0]
    return replace(spans, is_response=is_response)


def other_place(spans: TokenSpans) -> TokenSpans:
    return replace(spans, after_image=~spans.after_image)


def fewer_images(spans: TokenSpans) -> TokenSpans:
    return replace(spans, views=(), vision=spans.vision[:0])


def two_views(spans: TokenSpans) -> TokenSpans:
    (view,) = spans.views
    half = replace(view, rows=view.rows // 2)
    return replace(spans, views=(half, replace(half, view=1)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_ids, "from token 0 on found ids"),
        (other_roles, "differ in which of them are is_response"),
        (other_place, "differ in which of them are after_image"),
        (fewer_images, "the student sees 0 images, the teacher saw 1"),
        (two_views, "use matching scope `global`"),
    ],
)
@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_sample_whose_tokens_are_not_the_teachers_is_found(
    reader: CacheReader,
    teacher: Teacher,
    change: Callable[[TokenSpans], TokenSpans],
    reason: str,
    num_threads: int,
) -> None:
    encode = changed(teacher, 0, change)
    counts: list[int] = []
    found = find_misfits(
        reader, range(NUM_SAMPLES), encode, encode, limits(), num_threads, counts.append
    )
    ((index, misfit),) = found
    assert (index, misfit.key, misfit.source_id) == (0, reader.keys[0], "tiny-0")
    assert reason in misfit.reason
    assert counts == [1, 2, 3, 4, 5]
    assert find_misfits(reader, range(1, 5), encode, encode, limits()) == []


def test_the_remedy_of_other_views_is_one(reader: CacheReader, teacher: Teacher) -> None:
    encode = changed(teacher, 0, two_views)
    scopes: tuple[MatchScope | None, ...] = ("global", None)
    for scope in scopes:
        assert find_misfits(reader, range(5), encode, encode, limits(scope)) == []


def test_a_token_without_weights_is_found(reader: CacheReader, teacher: Teacher) -> None:
    encode = teacher.encoder.encode
    samples = [reader.read(index, ()).sample for index in range(NUM_SAMPLES)]
    top = [int(encode(sample).inputs["input_ids"].max()) for sample in samples]
    few = limits(embeddings=max(top))
    found = find_misfits(reader, range(NUM_SAMPLES), encode, encode, few)
    assert [index for index, _ in found] == [i for i, each in enumerate(top) if each == max(top)]
    assert f"token id {max(top)}, but the student's input embeddings have {max(top)} rows" in (
        found[0][1].reason
    )
    learnt = [int(s.content_ids[s.is_response].max()) for s in (encode(x).spans for x in samples)]
    small_head = replace(limits(), num_rows=max(learnt))
    found = find_misfits(reader, range(NUM_SAMPLES), encode, encode, small_head)
    assert [index for index, _ in found] == [
        i for i, each in enumerate(learnt) if each == max(learnt)
    ]
    assert f"the student's head has {max(learnt)} rows" in found[0][1].reason


def test_only_what_the_encoder_of_the_training_refuses_counts(
    reader: CacheReader, teacher: Teacher
) -> None:
    good, bad = teacher.encoder.encode, changed(teacher, 0, other_ids)
    assert find_misfits(reader, range(5), bad, good, limits()) == []
    assert len(find_misfits(reader, range(5), bad, bad, limits())) == 1


def test_any_error_of_a_processor_is_a_reason_but_lack_of_memory_is_not() -> None:
    def failing(error: Exception) -> Callable[[], None]:
        def encode() -> None:
            raise error

        return encode

    assert why_unusable(lambda: None) is None
    assert why_unusable(failing(SampleError("a", "too long"))) == "too long"
    reason = why_unusable(failing(ZeroDivisionError("by zero")))
    assert reason == "the processor fails with ZeroDivisionError: by zero"
    with pytest.raises(MemoryError):
        why_unusable(failing(MemoryError()))


def misfit(number: int, reason: str) -> RejectedSample:
    return RejectedSample(key=f"key-{number}", source_id=f"photo-{number}", reason=reason)


def test_a_message_counts_causes_and_names_the_first_samples_of_each() -> None:
    long = [misfit(n, f"it has {900 + n} tokens, the context holds 512.5") for n in range(5)]
    text = [misfit(7, "found ids [1, 2], expected [3]"), misfit(8, "found ids [4], expected []")]
    quoted = [misfit(9, "spells 'a' and \"b\"")]
    assert describe_misfits([*quoted, *text, *long]) == (
        "  5 x it has 900 tokens, the context holds 512.5 ('photo-0', 'photo-1', 'photo-2', ...)\n"
        "  2 x found ids [1, 2], expected [3] ('photo-7', 'photo-8')\n"
        "  1 x spells 'a' and \"b\" ('photo-9')"
    )
    letters = "abcdefghijklm"
    many = [misfit(n, f"cause {letter}") for n, letter in enumerate(letters)]
    lines = describe_misfits(many).splitlines()
    assert len(lines) == NUM_CAUSES + 1
    assert lines[-1] == "  3 x 3 other causes"


def test_the_lists_of_ids_do_not_make_causes_of_one(reader: CacheReader, teacher: Teacher) -> None:
    def encode(sample: Sample) -> EncodedSample:
        encoded = teacher.encoder.encode(sample)
        ids = encoded.spans.content_ids.clone()
        ids[torch.arange(len(ids)) >= int(sample.source_id[-1])] += 1
        return replace(encoded, spans=replace(encoded.spans, content_ids=ids))

    found = [each for _, each in find_misfits(reader, range(5), encode, encode, limits())]
    assert len(describe_misfits(found).splitlines()) == 1
    assert len({each.reason for each in found}) == 5
