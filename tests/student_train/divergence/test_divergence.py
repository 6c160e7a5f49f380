"""KL divergences against a teacher that is known whole, by its top-k, or by top-k and sketch."""

import math
from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import TailPolicy
from student_train.divergence.divergence import Divergence, forward_kl, jensen_shannon, reverse_kl
from student_train.divergence.tail_policies import resolve_tail
from student_train.signals.sketch_code import SketchCode
from student_train.signals.teacher_signal import DenseSignal, HiddenSignal, TopKSignal
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import SketchBasis, encode_sketch, fit_basis
from teacher_cache.records.top_k import top_k_record
from tests.support import references
from tests.support.batches import normal
from tests.support.strategies import true_record

VOCAB = 9


def top_k_signal(logits: Tensor, k: int) -> TopKSignal:
    return TopKSignal(record=replace(top_k_record(logits, k), log_least=None))


def sketch_signal(hidden: Tensor, head: LmHead, k: int, basis: SketchBasis) -> TopKSignal:
    record = top_k_record(head.logits(hidden), k)
    code = encode_sketch(basis, hidden, record)
    sketch = SketchCode(codes=code.codes, scale=code.scale, tail_shift=code.tail_shift, basis=basis)
    return TopKSignal(record=replace(record, log_least=None), sketch=sketch)


@pytest.fixture
def sketched() -> tuple[Tensor, TopKSignal, Tensor]:
    """Teacher logits [8, 9], their signal with a rank-2 sketch, and the logits it decodes to."""
    head = LmHead(weight=normal(1, VOCAB, 6))
    hidden = normal(2, 8, 6)
    signal = sketch_signal(hidden, head, 3, fit_basis(hidden, head, 2))
    assert signal.sketch is not None
    return head.logits(hidden), signal, signal.sketch.logits()


def gradient(divergence: Divergence, student: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(divergence.value.sum(), student)
    return found


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(0.1, 20.0),
    temperature=st.sampled_from([1.0, 2.0, 0.5]),
)
def test_exact_divergences_are_those_of_the_loops_and_never_negative(
    seed: int, scale: float, temperature: float
) -> None:
    student, teacher = scale * normal(seed, 4, VOCAB), scale * normal(seed + 1, 4, VOCAB)
    signal = DenseSignal(logits=teacher)
    found = reverse_kl(student, signal, "exact", temperature).value
    back = forward_kl(student, signal, "exact", temperature).value
    both = jensen_shannon(student, signal, "exact", temperature).value
    swapped = jensen_shannon(teacher, DenseSignal(logits=student), "exact", temperature).value
    torch.testing.assert_close(both, swapped)
    for row in range(4):
        s, t = student[row].tolist(), teacher[row].tolist()
        assert found[row].item() == pytest.approx(
            references.reverse_kl(s, t, temperature), rel=1e-9, abs=1e-9
        )
        assert back[row].item() == pytest.approx(
            references.reverse_kl(t, s, temperature), rel=1e-9, abs=1e-9
        )
        assert both[row].item() == pytest.approx(
            references.jensen_shannon(s, t, temperature), rel=1e-9, abs=1e-9
        )
    assert bool((found >= 0).all())
    assert bool((both <= math.log(2) * temperature**2 + 1e-12).all())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), k=st.integers(1, VOCAB - 1), scale=st.floats(0.1, 10.0))
def test_the_bucket_is_a_lower_bound_of_the_dense_divergence(
    seed: int, k: int, scale: float
) -> None:
    student, teacher = scale * normal(seed, 4, VOCAB), scale * normal(seed + 1, 4, VOCAB)
    for divergence in (reverse_kl, forward_kl, jensen_shannon):
        dense = divergence(student, DenseSignal(logits=teacher))
        bucket = divergence(student, top_k_signal(teacher, k), "bucket")
        assert bool((bucket.value <= dense.value + 1e-9).all())
    expected = [
        references.bucket_reverse_kl(s.tolist(), t.tolist(), k)
        for s, t in zip(student, teacher, strict=True)
    ]
    found = reverse_kl(student, top_k_signal(teacher, k), "bucket")
    assert found.value.tolist() == pytest.approx(expected, rel=1e-8, abs=1e-8)
    torch.testing.assert_close(found.head + found.bucket + found.tail, found.value)


@pytest.mark.parametrize("policy", get_args(TailPolicy))
def test_k_equal_to_the_vocabulary_is_the_dense_teacher_bit_for_bit(policy: TailPolicy) -> None:
    student = normal(3, 5, VOCAB).float().requires_grad_()
    teacher = normal(4, 5, VOCAB).float()
    counted = TopKSignal(record=true_record(teacher, [VOCAB] * 5))
    assert counted.exact
    assert torch.equal(counted.dense_logits(), teacher)
    signals = (top_k_signal(teacher, VOCAB), counted)
    for divergence, signal in product((reverse_kl, forward_kl, jensen_shannon), signals):
        dense = divergence(student, DenseSignal(logits=teacher), "exact", 2.0)
        kept = divergence(student, signal, policy, 2.0)
        assert torch.equal(dense.value, kept.value)
        assert torch.equal(gradient(dense, student), gradient(kept, student))
        assert torch.equal(kept.lower, kept.upper)


def test_a_hidden_signal_is_the_dense_signal_of_its_head_bit_for_bit() -> None:
    head = LmHead(weight=normal(5, VOCAB, 4).float(), bias=normal(6, VOCAB).float())
    hidden = normal(7, 5, 4).float()
    student = normal(8, 5, VOCAB).float().requires_grad_()
    dense = reverse_kl(student, DenseSignal(logits=head.logits(hidden)))
    states = reverse_kl(student, HiddenSignal(hidden=hidden, head=head))
    assert torch.equal(dense.value, states.value)
    assert torch.equal(gradient(dense, student), gradient(states, student))


def test_the_gradient_is_p_times_log_ratio_minus_divergence_and_the_teacher_gets_none() -> None:
    student = normal(9, 4, VOCAB).requires_grad_()
    teacher = normal(10, 4, VOCAB).requires_grad_()
    found = reverse_kl(student, DenseSignal(logits=teacher))
    log_q, log_p = student.detach().log_softmax(1), teacher.detach().log_softmax(1)
    ratio = log_q - log_p
    expected = log_q.exp() * (ratio - found.value.detach()[:, None])
    found.value.sum().backward()
    torch.testing.assert_close(student.grad, expected)
    assert teacher.grad is None


def test_adding_a_constant_to_the_teachers_logits_changes_no_divergence() -> None:
    student, teacher = normal(12, 4, VOCAB), normal(13, 4, VOCAB)
    for k in (3, VOCAB):
        plain = reverse_kl(student, top_k_signal(teacher, k)).value
        shifted = reverse_kl(student, top_k_signal(teacher + 5.0, k)).value
        torch.testing.assert_close(plain, shifted)
    for policy in ("bucket", "renormalise"):
        moved = reverse_kl(student + 7.0, top_k_signal(teacher, 3), policy).value
        torch.testing.assert_close(
            reverse_kl(student, top_k_signal(teacher, 3), policy).value, moved
        )


@pytest.mark.parametrize("blend", [0.25, 0.5, 1.0])
def test_the_blend_is_the_chain_rule_with_the_sketched_tail(
    blend: float, sketched: tuple[Tensor, TopKSignal, Tensor]
) -> None:
    teacher, signal, decoded = sketched
    student = normal(14, 8, VOCAB)
    found = reverse_kl(student, signal, "blend", 1.0, blend)
    for row in range(8):
        expected = references.blended_reverse_kl(
            student[row].tolist(), teacher[row].tolist(), decoded[row].tolist(), 3, blend
        )
        assert found.value[row].item() == pytest.approx(expected, abs=1e-6)


def test_a_sketch_of_full_rank_makes_the_blend_exact_at_any_temperature() -> None:
    head = LmHead(weight=normal(15, VOCAB, 4))
    hidden = normal(16, 20, 4)
    signal = sketch_signal(hidden, head, 3, fit_basis(hidden, head, 4))
    student = normal(17, 20, VOCAB)
    for temperature in (1.0, 2.0):
        exact = reverse_kl(student, HiddenSignal(hidden=hidden, head=head), "exact", temperature)
        found = reverse_kl(student, signal, "blend", temperature, 1.0)
        torch.testing.assert_close(found.value, exact.value, rtol=0.03, atol=0.03)
        assert bool((found.lower > 0).all()) == (temperature == 1.0), "estimates bound nothing"


def test_far_from_the_teacher_the_blend_points_closer_to_the_true_gradient() -> None:
    vocab, width = 200, 12
    spectrum = torch.linspace(1.5, 0.1, width, dtype=torch.float64)
    head = LmHead(weight=normal(18, vocab, width))
    hidden = normal(19, 64, width) * spectrum
    signal = sketch_signal(hidden, head, 8, fit_basis(hidden, head, 8))
    student = 2.0 * normal(20, 64, vocab).requires_grad_()
    true = gradient(reverse_kl(student, HiddenSignal(hidden=hidden, head=head)), student)
    cosines = {
        policy: torch.cosine_similarity(
            gradient(reverse_kl(student, signal, policy), student), true, dim=1
        ).mean()
        for policy in ("blend", "bucket")
    }
    assert cosines["blend"] > cosines["bucket"] + 0.05, cosines


def test_renormalising_says_nothing_of_mass_outside_the_top_k() -> None:
    teacher = normal(21, 3, VOCAB)
    signal = top_k_signal(teacher, 3)
    elsewhere = teacher.scatter_add(
        1, teacher.topk(VOCAB - 3, largest=False).indices, torch.full((3, VOCAB - 3), 4.0).double()
    )
    found = reverse_kl(elsewhere, signal, "renormalise")
    torch.testing.assert_close(found.value, torch.zeros(3, dtype=torch.float64))
    assert bool((found.student_tail_mass > 0.5).all())
    assert bool((reverse_kl(elsewhere, signal, "bucket").value > 0.5).all())


def test_extra_vocabulary_rows_of_the_student_are_cut_before_the_softmax() -> None:
    student, teacher = normal(22, 3, VOCAB + 4), DenseSignal(logits=normal(23, 3, VOCAB))
    torch.testing.assert_close(
        reverse_kl(student, teacher).value, reverse_kl(student[:, :VOCAB], teacher).value
    )


def test_a_certain_student_and_no_rows_give_finite_numbers() -> None:
    student = torch.zeros(2, VOCAB, dtype=torch.float64)
    student[:, 0] = 2000.0
    student.requires_grad_()
    found = reverse_kl(student, top_k_signal(normal(26, 2, VOCAB), 2), "bucket")
    assert bool(torch.isfinite(gradient(found, student)).all())
    empty = reverse_kl(
        student[:0], top_k_signal(normal(26, 2, VOCAB), 2).rows(torch.tensor([]).long())
    )
    assert empty.value.shape == (0,)


def test_the_policy_that_is_used_follows_from_what_the_signal_knows(
    sketched: tuple[Tensor, TopKSignal, Tensor],
) -> None:
    teacher, with_sketch, _ = sketched
    without = top_k_signal(teacher, 3)
    policies = get_args(TailPolicy)
    for policy in policies:
        assert resolve_tail(policy, DenseSignal(logits=teacher)) == "exact"
        assert resolve_tail(policy, top_k_signal(teacher, VOCAB)) == "exact"
    assert [resolve_tail(policy, with_sketch) for policy in policies[1:]] == list(policies[1:])
    assert resolve_tail("blend", without) == "bucket"
    assert resolve_tail("renormalise", without) == "renormalise"
    with pytest.raises(ValueError, match="3 largest of 9 logits; build it with records `hidden`"):
        resolve_tail("exact", without)


def test_a_lumped_tail_refuses_temperatures_it_cannot_follow() -> None:
    signal = top_k_signal(normal(27, 2, VOCAB), 3)
    with pytest.raises(ValueError, match=r"temperature 2\.0 the mass of the tail"):
        reverse_kl(normal(28, 2, VOCAB), signal, "bucket", 2.0)
    value = reverse_kl(normal(28, 2, VOCAB), signal, "renormalise", 2.0).value
    assert math.isfinite(value.sum().item())


def test_sides_that_do_not_face_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 9\) do not match a teacher of 3 rows"):
        reverse_kl(normal(29, 2, VOCAB), DenseSignal(logits=normal(30, 3, VOCAB)))
    with pytest.raises(ValueError, match="do not match"):
        reverse_kl(normal(29, 2, VOCAB - 1), DenseSignal(logits=normal(30, 2, VOCAB)))
