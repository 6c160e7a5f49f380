"""Bounds of a divergence from a top-k record: bucket <= clipped bound <= true value <= upper."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import TailPolicy
from student_train.divergence import tail_bounds
from student_train.divergence.divergence import Divergence, forward_kl, jensen_shannon, reverse_kl
from student_train.divergence.student_rows import largest_entries
from student_train.signals.from_cache import response_signal
from student_train.signals.teacher_signal import DenseSignal, TopKSignal
from teacher_cache.codec.columns import encode_columns, output_columns, output_from_columns
from teacher_cache.codec.frames import decode_frame
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.top_k import top_k_record
from teacher_cache.schema.teacher_output import TeacherOutput
from tests.student_train.signals.test_top_k import ragged
from tests.support import references
from tests.support.batches import normal
from tests.support.strategies import make_spec

VOCAB = 12
MEASURES = (reverse_kl, forward_kl, jensen_shannon)
SCALES = st.sampled_from([0.01, 0.3, 1.0, 4.0, 15.0])


def top_k(logits: Tensor, k: int) -> TopKSignal:
    return TopKSignal(record=top_k_record(logits, k))


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, VOCAB - 1),
    student_scale=SCALES,
    teacher_scale=SCALES,
    most=st.sampled_from([1, 3, 32]),
    measure=st.sampled_from(MEASURES),
    floored=st.booleans(),
)
def test_the_true_divergence_lies_between_the_bounds_and_these_beyond_the_bucket(
    seed: int,
    k: int,
    student_scale: float,
    teacher_scale: float,
    most: int,
    measure: Callable[..., Divergence],
    floored: bool,
) -> None:
    student = student_scale * normal(seed, 6, VOCAB)
    teacher = teacher_scale * normal(seed + 1, 6, VOCAB)
    true = measure(student, DenseSignal(logits=teacher)).value
    signal = top_k(teacher, k)
    if not floored:
        signal = replace(signal, record=replace(signal.record, log_least=None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail_bounds, "MOST_CAPPED", most)
        found = measure(student, signal, "bucket")
    slack = 1e-9 * (1 + true.abs())
    assert bool((found.value <= found.lower + slack).all())
    assert bool((found.lower <= true + slack).all())
    assert bool((true <= found.upper + slack).all())
    assert bool(torch.isfinite(found.upper).all()) == (floored or measure is not reverse_kl)
    assert measure is not jensen_shannon or bool((found.upper <= math.log(2)).all())


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, VOCAB - 1),
    scale=SCALES,
    mass=st.sampled_from([None, 0.5, 0.95]),
    lossy=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_bounds_hold_of_the_teacher_that_a_cache_was_made_with(
    seed: int, k: int, scale: float, mass: float | None, lossy: bool, dtype: torch.dtype
) -> None:
    """Stored, read back and compared with the teacher's own logits, which a codec may round."""
    teacher = (scale * normal(seed, 5, VOCAB)).to(dtype)
    student = scale * normal(seed + 1, 5, VOCAB)
    changes = {"logits_codec": "affine8" if lossy else "exact", "top_k": k, "top_p": mass}
    spec = make_spec("topk", vocab_size=VOCAB, least_logits=True, **changes)
    record = top_k_record(teacher, k, mass)
    output = TeacherOutput(
        views=(),
        content_ids=torch.zeros(5, dtype=torch.int64),
        is_response=torch.ones(5, dtype=torch.bool),
        after_image=torch.zeros(5, dtype=torch.bool),
        response=record,
    )
    frames = encode_columns(output_columns(output, spec))
    columns = {name: decode_frame(frame) for name, frame in frames.items()}
    signal = response_signal(output_from_columns(columns, VOCAB, k), TeacherAssets())
    assert isinstance(signal, TopKSignal)
    true = reverse_kl(student, DenseSignal(logits=teacher)).value
    found = reverse_kl(student, signal)
    rounded = (signal.record.logits - record.logits[:, : signal.max_kept].float()).abs().max()
    slack = 1e-5 * (1 + true.abs()) + float(rounded)
    assert bool((found.lower - slack <= true).all())
    assert bool((true <= found.upper + slack).all())
    assert bool(torch.isfinite(found.upper).all())
    assert lossy or float(rounded) == 0


def test_the_upper_bound_is_the_value_of_a_tail_that_lies_at_the_floor_everywhere() -> None:
    student, teacher = normal(1, 4, VOCAB), 2 * normal(2, 4, VOCAB)
    signal = top_k(teacher, 3)
    found = reverse_kl(student, signal).upper.tolist()
    for row in range(4):
        log_q = references.log_softmax(student[row].tolist())
        log_p = references.log_softmax(teacher[row].tolist())
        least = min(log_p)
        kept = references.top_ids(teacher[row].tolist(), 3)
        worst = [p if v in kept else least for v, p in enumerate(log_p)]
        assert found[row] == pytest.approx(references.kl(log_q, worst), rel=2e-3)
        assert found[row] >= references.kl(log_q, worst), "a floor is rounded down"


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), k=st.integers(1, VOCAB - 1), scale=SCALES)
def test_the_lower_bound_is_the_value_of_the_worst_teacher_that_the_record_allows(
    seed: int, k: int, scale: float
) -> None:
    student, teacher = scale * normal(seed, 4, VOCAB), 2 * normal(seed + 1, 4, VOCAB)
    found = reverse_kl(student, top_k(teacher, k))
    for row in range(4):
        own, theirs = student[row].tolist(), teacher[row].tolist()
        closest = closest_teacher(references.probabilities(own), theirs, k)
        expected = references.kl(references.log_softmax(own), [math.log(p) for p in closest])
        assert found.lower[row].item() == pytest.approx(expected, abs=1e-7)


def closest_teacher(q: Sequence[float], teacher: Sequence[float], k: int) -> list[float]:
    """min(c, a q) in the tail, with `a` found by bisection."""
    p = references.probabilities(teacher)
    kept = references.top_ids(teacher, k)
    tail = [v for v in range(len(p)) if v not in kept]
    cap, mass = min(p[v] for v in kept), sum(p[v] for v in tail)
    low, high = 0.0, 1e30
    for _ in range(400):
        middle = math.sqrt(low * high) if low else high / 2**10
        middle = max(middle, 1e-30)
        if sum(min(cap, middle * q[v]) for v in tail) < mass:
            low = middle
        else:
            high = middle
    for v in tail:
        p[v] = min(cap, high * q[v])
    return p


def test_the_clipped_bound_sees_what_the_bucket_does_not() -> None:
    """A student that is sure of a token outside the top-k, where the teacher's tail is wide."""
    teacher = torch.zeros(1, 1000, dtype=torch.float64)
    teacher[0, :4] = 3.0
    student = torch.zeros_like(teacher)
    student[0, 500] = 12.0
    found = reverse_kl(student, top_k(teacher, 4), "bucket")
    true = reverse_kl(student, DenseSignal(logits=teacher)).value
    assert found.value.item() < 0.2
    assert found.lower.item() > 2.5
    assert found.lower.item() < true.item()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    measure=st.sampled_from(MEASURES),
    policy=st.sampled_from(get_args(TailPolicy)[1:]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_bounds_do_not_depend_on_the_policy_and_are_exact_where_all_is_kept(
    seed: int,
    counts: list[int],
    measure: Callable[..., Divergence],
    policy: TailPolicy,
    dtype: torch.dtype,
) -> None:
    logits, signal = ragged(seed, counts, sketched=True, dtype=dtype)
    student = normal(seed + 3, len(counts), 9).to(dtype)
    found, bucket = measure(student, signal, policy), measure(student, signal, "bucket")
    true = measure(student, DenseSignal(logits=logits)).value
    slack = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found.lower, bucket.lower, rtol=0, atol=slack)
    torch.testing.assert_close(found.upper, bucket.upper, rtol=0, atol=slack)
    assert bool((found.lower <= true + slack).all())
    assert bool((true <= found.upper + slack).all())
    whole = torch.tensor(counts) == 9
    torch.testing.assert_close(found.lower[whole], true[whole], rtol=0, atol=slack)
    torch.testing.assert_close(found.upper[whole], true[whole], rtol=0, atol=slack)
    assert not found.lower.requires_grad


def test_at_other_temperatures_an_estimated_tail_bounds_nothing() -> None:
    _, signal = ragged(5, [2, 4], sketched=True)
    student = normal(6, 2, 9)
    for measure, most in zip(MEASURES, (math.inf, math.inf, 4 * math.log(2)), strict=True):
        for policy in ("blend", "bucket", "renormalise"):
            found = measure(student, signal, policy, 2.0)
            assert found.lower.tolist() == [0.0, 0.0]
            assert found.upper.tolist() == [most, most]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 700), most=st.integers(1, 8))
def test_the_largest_entries_are_those_of_sorting(seed: int, width: int, most: int) -> None:
    values = normal(seed, 3, width)
    values[0, ::3] = values[0, 0]
    values[1, ::2] = -torch.inf
    expected = values.sort(dim=1, descending=True).values[:, :most]
    assert torch.equal(largest_entries(values, most), expected)


@pytest.mark.parametrize("measure", MEASURES)
def test_extreme_rows_have_finite_lower_bounds(measure: Callable[..., Divergence]) -> None:
    teacher = torch.zeros(3, VOCAB)
    teacher[0, 0] = 3000.0
    teacher[1, 0] = 80.0
    student = torch.zeros(3, VOCAB)
    student[:, 1] = torch.tensor([3000.0, 80.0, 3000.0])
    found = measure(student, top_k(teacher, 1), "bucket")
    true = measure(student, DenseSignal(logits=teacher)).value
    assert bool(torch.isfinite(found.lower).all())
    assert bool((found.lower <= true * (1 + 1e-5) + 1e-5).all())
    assert bool((true <= found.upper * (1 + 1e-5)).all())
