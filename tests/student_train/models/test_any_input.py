"""Any precision, any layout in memory, with or without autograd: one result, inputs untouched.

What bfloat16, float16 and float32 give is held against float64 of the very same numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_train.config.objective import MatchingConfig, MatchMetric, ObjectiveConfig, TailPolicy
from student_train.divergence.divergence import Divergence, forward_kl, jensen_shannon, reverse_kl
from student_train.losses.objective_loss import LossTerms, distillation_loss
from student_train.matching.cost import cost_matrix
from student_train.signals.teacher_signal import DenseSignal, HiddenSignal, Signal
from student_train.signals.top_k import TopKSignal
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.top_k import top_k_record
from tests.support.batches import (
    ONE_IMAGE,
    TEXT_ONLY,
    TILES,
    RandomBatch,
    RecordForm,
    normal,
    random_batch,
)

VOCAB = 19
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["plain", "transposed", "expanded", "every other"]
MEASURES = (reverse_kl, forward_kl, jensen_shannon)
FORMS: tuple[RecordForm, ...] = ("hidden", "topk", "topk+sketch")
UNSKETCHED: list[TailPolicy] = ["bucket", "renormalise"]


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same shape and dtype, in another place of memory; `expanded` repeats the first row."""
    if layout == "transposed":
        return values.T.contiguous().T
    if layout == "expanded":
        return values[:1].expand_as(values)
    return values.repeat_interleave(2, dim=0)[::2] if layout == "every other" else values


def tensors_in(part: Any) -> Iterator[Tensor]:
    """Every tensor inside dataclasses, lists and dicts."""
    if isinstance(part, Tensor):
        yield part
    elif is_dataclass(part):
        for field in fields(part):
            yield from tensors_in(getattr(part, field.name))
    elif isinstance(part, dict | list | tuple):
        for value in part.values() if isinstance(part, dict) else part:
            yield from tensors_in(value)


def copies(*parts: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors_in(parts)]


def assert_untouched(before: list[Tensor], *parts: Any) -> None:
    for old, new in zip(before, tensors_in(parts), strict=True):
        assert torch.equal(old, new.detach())


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    k=st.sampled_from([1, 2, VOCAB - 1, VOCAB]),
    scales=st.tuples(*[st.sampled_from([0.0, 0.1, 1.0, 6.0, 30.0])] * 2),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    layout=st.sampled_from(LAYOUTS),
    policy=st.sampled_from(UNSKETCHED),
    measure=st.sampled_from(MEASURES),
)
def test_divergences_gradients_and_bounds_are_those_of_float64(
    seed: int,
    k: int,
    scales: tuple[float, float],
    dtypes: tuple[torch.dtype, torch.dtype],
    layout: str,
    policy: TailPolicy,
    measure: Callable[..., Divergence],
) -> None:
    values = laid_out((normal(seed, 3, VOCAB + 2) * scales[0]).to(dtypes[0]), layout)
    student = values.detach().requires_grad_()
    teacher = laid_out((normal(seed + 1, 3, VOCAB) * scales[1]).to(dtypes[1]), layout)
    signal = TopKSignal(record=top_k_record(teacher, k))
    before = copies(student, teacher, signal)
    found = measure(student, signal, policy)
    (gradient,) = torch.autograd.grad(found.value.sum(), student)
    assert_untouched(before, student, teacher, signal)
    assert found.value.dtype == torch.float32
    assert gradient.dtype == dtypes[0]

    wide = student.detach().double().requires_grad_()
    exact = measure(wide, TopKSignal(record=top_k_record(teacher.double(), k)), policy)
    (true_gradient,) = torch.autograd.grad(exact.value.sum(), wide)
    # Of logits of size x, float32 knows the logarithm of a probability to x units.
    unit = 1e-6 * (1 + float(wide.detach().abs().max()) + float(teacher.double().abs().max()))
    torch.testing.assert_close(found.value.double(), exact.value, rtol=unit, atol=unit)
    rounding = torch.finfo(dtypes[0]).eps
    torch.testing.assert_close(
        gradient.double(), true_gradient, rtol=rounding, atol=20 * unit + rounding * 1e-2
    )
    true = measure(wide.detach(), DenseSignal(logits=teacher.double())).value
    bucket = measure(student, signal, "bucket").value
    slack = unit * (1 + true)
    assert bool((bucket.double() <= found.lower + slack).all())
    assert bool((found.lower <= true + slack).all())
    assert bool((true <= found.upper + slack).all())


@pytest.mark.parametrize("policy", get_args(TailPolicy))
@pytest.mark.parametrize("dtype", DTYPES)
def test_k_equal_to_the_vocabulary_is_the_dense_teacher_bit_for_bit_in_any_precision(
    policy: TailPolicy, dtype: torch.dtype
) -> None:
    student = (4 * normal(1, 4, VOCAB)).to(dtype).requires_grad_()
    teacher = (4 * normal(2, 4, VOCAB)).to(dtype)
    for measure in MEASURES:
        dense = measure(student, DenseSignal(logits=teacher))
        kept = measure(student, TopKSignal(record=top_k_record(teacher, VOCAB)), policy)
        assert torch.equal(kept.value, dense.value)
        one, other = (torch.autograd.grad(each.value.sum(), student)[0] for each in (kept, dense))
        assert torch.equal(one, other)


@settings(deadline=None, max_examples=120)
@given(
    seed=st.integers(0, 10**6),
    metric=st.sampled_from(get_args(MatchMetric)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    inference=st.booleans(),
)
def test_costs_are_those_of_float64_have_no_gradient_and_edit_nothing(
    seed: int, metric: MatchMetric, dtype: torch.dtype, layout: str, scale: float, inference: bool
) -> None:
    hidden = laid_out(normal(seed, 3, 5).to(dtype), layout).requires_grad_()
    student = laid_out((scale * normal(seed + 1, 3, VOCAB + 2)).to(dtype), layout)
    student = student.detach().requires_grad_()
    theirs = normal(seed + 2, 4, 5).to(dtype)
    head = LmHead(weight=normal(seed + 3, VOCAB, 5).to(dtype))
    signal: Signal = HiddenSignal(hidden=theirs, head=head)
    config = MatchingConfig(metric=metric, num_shared_ids=None)
    before = copies(hidden, student, theirs, head)
    with torch.inference_mode(inference):
        found = cost_matrix(hidden, student, signal, config)
    assert_untouched(before, hidden, student, theirs, head)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    wide_head = LmHead(weight=head.weight.double())
    expected = cost_matrix(
        hidden.double(),
        student.double(),
        HiddenSignal(hidden=theirs.double(), head=wide_head),
        config,
    )
    # The head multiplies in its own precision; what follows is float32.
    size = float(theirs.double().abs().max() * head.weight.double().abs().max())
    size += float(student.detach().double().abs().max())
    error = VOCAB * size * (torch.finfo(dtype).eps + 1e-6)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=error)


def objective(form: RecordForm) -> ObjectiveConfig:
    return ObjectiveConfig(
        matching=MatchingConfig(metric="prob_l1" if form == "topk" else "raw_l1")
    )


def loss(batch: RandomBatch, form: RecordForm) -> LossTerms:
    return batch.loss(objective(form), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_forward_and_back_edits_nothing_that_it_is_given(
    form: RecordForm, dtype: torch.dtype
) -> None:
    batch = random_batch(3, [ONE_IMAGE, TEXT_ONLY, TILES], dtype=dtype)
    outputs, assets = batch.outputs(form), batch.assets(form)
    parts = [batch.states, outputs, assets.head, assets.sketch, batch.student_head.weight]
    before = copies(*parts)
    head = batch.student_head
    found = distillation_loss(batch.states, outputs, head, objective(form), assets)
    gradients = torch.autograd.grad(found.total, batch.parameters, allow_unused=True)
    assert_untouched(before, *parts)
    for parameter, gradient in zip(batch.parameters, gradients, strict=True):
        assert gradient is None or gradient.dtype == dtype == parameter.dtype
        assert gradient is None or bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inference", [False, True])
def test_without_autograd_the_objective_is_what_it_is_in_training(
    form: RecordForm, inference: bool
) -> None:
    batch = random_batch(4)
    expected = loss(batch, form)
    with torch.inference_mode(inference), torch.no_grad():
        copied = [
            replace(
                s, vision=s.vision.clone(), text=s.text.clone(), predicting=s.predicting.clone()
            )
            for s in batch.states
        ]
        found = loss(replace(batch, states=copied), form)
    assert not found.total.requires_grad
    assert found.total.item() == expected.total.item()
    assert found.diagnostics == expected.diagnostics


@pytest.mark.parametrize("form", FORMS)
def test_the_same_step_twice_gives_the_same_bits(form: RecordForm) -> None:
    batch = random_batch(5, dtype=torch.float32)
    one, other = loss(batch, form), loss(batch, form)
    assert torch.equal(one.total, other.total)
    grad = partial(
        torch.autograd.grad, inputs=batch.parameters, allow_unused=True, materialize_grads=True
    )
    for first, second in zip(grad(one.total), grad(other.total), strict=True):
        assert torch.equal(first, second)
