"""Euclidean distances in closed form are those of the decoded logits, for every kind of teacher."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import MatchingConfig
from student_train.matching import l2_cost
from student_train.matching.cost import cost_matrix
from student_train.matching.cost_error import cost_error
from student_train.signals.from_cache import vision_signal
from student_train.signals.teacher_signal import DenseSignal, HiddenSignal, Signal
from student_train.signals.top_k import TopKSignal
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.lm_head import LmHead
from tests.support.batches import ONE_IMAGE, TWO_IMAGES, random_batch

VOCAB = 11
CONFIG = MatchingConfig(metric="raw_l2")


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def distances(student: Tensor, teacher: Tensor) -> Tensor:
    """By the loops."""
    found = [
        [sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) ** 0.5 for t in teacher.tolist()]
        for s in student.tolist()
    ]
    return torch.tensor(found, dtype=torch.float64).reshape(len(student), len(teacher))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    num_students=st.integers(0, 4),
    num_teachers=st.integers(1, 5),
    bias=st.booleans(),
)
def test_states_under_a_head_are_as_far_apart_as_their_logits(
    seed: int, num_students: int, num_teachers: int, bias: bool
) -> None:
    head = LmHead(weight=normal(seed, VOCAB, 4), bias=normal(seed + 1, VOCAB) if bias else None)
    hidden, student = normal(seed + 2, num_teachers, 4), normal(seed + 3, num_students, VOCAB + 2)
    before = hidden.clone(), student.clone()
    expected = distances(student[:, :VOCAB], head.logits(hidden))
    for teacher in (
        HiddenSignal(hidden=hidden, head=head),
        DenseSignal(logits=head.logits(hidden)),
    ):
        found = cost_matrix(student[:, :1], student, teacher, CONFIG)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-6)
    assert torch.equal(hidden, before[0])
    assert torch.equal(student, before[1])


@pytest.mark.parametrize("kept", [3, VOCAB])
def test_codes_are_as_far_apart_as_what_they_decode_to(kept: int) -> None:
    batch = random_batch(0, [ONE_IMAGE], dtype=torch.float32)
    record = batch.outputs("topk+sketch", kept)[0]
    teacher = vision_signal(record, batch.assets("topk+sketch"))
    student = normal(1, 3, VOCAB).float()
    decoded = teacher.logits_at(torch.arange(VOCAB))
    found = cost_matrix(student[:, :1], student, teacher, CONFIG)
    torch.testing.assert_close(found.double(), distances(student, decoded), rtol=1e-5, atol=1e-4)


def test_positions_that_keep_all_are_exact_beside_others() -> None:
    batch = random_batch(2, [ONE_IMAGE], dtype=torch.float32)
    whole = vision_signal(batch.outputs("topk+sketch", VOCAB)[0], batch.assets("topk+sketch"))
    assert isinstance(whole, TopKSignal)
    counts = torch.full((whole.num_rows,), VOCAB)
    counts[0] = 2
    mixed = replace(whole, num_kept=counts)
    student = normal(3, 2, VOCAB).float()
    found = cost_matrix(student[:, :1], student, mixed, CONFIG)
    expected = distances(student, mixed.logits_at(torch.arange(VOCAB)))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_more_vocabulary_than_a_block_is_summed_to_the_end(dtype: torch.dtype) -> None:
    vocab_size = 2 * 8192 + 5
    head = LmHead(weight=normal(4, vocab_size, 3).float(), bias=normal(5, vocab_size).float() + 3)
    hidden, student = normal(6, 4, 3).float(), normal(7, 3, vocab_size).to(dtype)
    expected = torch.cdist(student.double(), head.logits(hidden).double())
    for teacher in (
        HiddenSignal(hidden=hidden, head=head),
        DenseSignal(logits=head.logits(hidden)),
    ):
        found = cost_matrix(student[:, :1], student, teacher, CONFIG)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_the_gram_matrix_of_a_head_is_computed_once_and_forgotten_with_it() -> None:
    grams = l2_cost._grams  # pyright: ignore[reportPrivateUsage]
    before = len(grams)
    head = LmHead(weight=normal(8, VOCAB, 4))
    student = normal(9, 2, VOCAB)
    for seed in (10, 11):
        teacher = HiddenSignal(hidden=normal(seed, 3, 4), head=head)
        cost_matrix(student[:, :1], student, teacher, CONFIG)
        assert len(grams) == before + 1
    del head, teacher
    assert len(grams) == before


def test_distances_of_states_want_states_of_one_width() -> None:
    hidden, student = normal(12, 4, 6), normal(13, 3, 6)
    teacher: Signal = HiddenSignal(hidden=hidden, head=LmHead(weight=normal(14, VOCAB, 6)))
    config = MatchingConfig(metric="hidden_l2")
    found = cost_matrix(student, None, teacher, config)
    torch.testing.assert_close(found, distances(student, hidden))
    with pytest.raises(ValueError, match="hidden_l2 needs equal widths, found student 5 and"):
        cost_matrix(student[:, :5], None, teacher, config)
    with pytest.raises(ValueError, match=r"hidden_l2 needs the teacher's states.*records `hidden`"):
        cost_matrix(student, None, DenseSignal(logits=normal(15, 4, VOCAB)), config)


def test_what_no_tier_can_serve_is_refused_with_the_remedy() -> None:
    batch = random_batch(16, [TWO_IMAGES])
    bare = vision_signal(batch.outputs("topk", 4)[0], TeacherAssets())
    student = normal(17, 2, VOCAB)
    with pytest.raises(ValueError, match=r"raw_l2 needs logits outside the top 4.*prob_l1"):
        cost_matrix(student[:, :1], student, bare, CONFIG)
    hidden = vision_signal(batch.hidden_outputs[0], batch.assets("hidden"))
    with pytest.raises(ValueError, match="no bound is known for the error of raw_l2"):
        cost_error(hidden, CONFIG, torch.float32)
