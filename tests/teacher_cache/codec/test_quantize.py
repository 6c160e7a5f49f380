"""Eight bits: errors within what is promised, exact where promised, and why states need groups."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from teacher_cache.codec.quantize import (
    from_int8,
    from_scale,
    largest_error,
    largest_relative_error,
    to_int8,
    to_scale,
)
from teacher_cache.records.affinity import cosine_affinity
from tests.support.strategies import FLOATS


def _values(seed: int, rows: int, columns: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * scale
    values[torch.rand(rows, columns, generator=generator) < 0.2] = 0.0
    return values


SHAPES = {"rows": st.integers(0, 5), "columns": st.integers(0, 9)}
SEEDS = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(
    seed=SEEDS, scale=st.sampled_from([1e-3, 1.0, 30.0]), dtype=st.sampled_from(FLOATS), **SHAPES
)
def test_codes_on_a_scale_are_within_half_a_step_and_exact_at_the_ends(
    seed: int, rows: int, columns: int, scale: float, dtype: torch.dtype
) -> None:
    values = _values(seed, rows, columns, scale).to(dtype)
    codes, low, high = to_scale(values)
    assert (codes.dtype, low.dtype, high.dtype) == (torch.uint8, dtype, dtype)
    back = from_scale(codes, low, high)
    assert back.dtype == torch.float32
    for row in range(rows if columns else 0):
        numbers = values[row].double().tolist()
        least, most = min(numbers), max(numbers)
        for exact, stored in zip(numbers, back[row].double().tolist(), strict=True):
            step = (most - least) / 255
            assert abs(exact - stored) <= step / 2 + 1e-6 * max(abs(least), abs(most))
            if exact in (least, most):
                assert stored == exact


@settings(deadline=None)
@given(seed=SEEDS, scale=st.sampled_from([1e-30, 1.0, 1e30]), group=st.integers(1, 12), **SHAPES)
def test_int8_states_are_within_half_a_scale_and_products_are_exact(
    seed: int, rows: int, columns: int, scale: float, group: int
) -> None:
    columns += 1
    states = _values(seed, rows, columns, scale)
    codes, scales = to_int8(states, group)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
    num_groups = math.ceil(columns / group)
    assert scales.shape == (rows, num_groups)
    size = math.ceil(columns / num_groups)
    assert size <= group
    back = from_int8(codes, scales)
    for row in range(rows):
        for channel in range(columns):
            step = float(scales[row, channel // size])
            stored = float(codes[row, channel]) * step  # in float64
            assert float(back[row, channel]) == stored
            exact = float(states[row, channel])
            assert abs(stored - exact) <= 0.5001 * step
        for number in range(num_groups):
            peak = float(states[row, number * size : (number + 1) * size].abs().max())
            if peak > 0:
                assert peak / 127 * 0.9999 <= float(scales[row, number]) <= peak / 127 * 1.0079


@pytest.mark.parametrize("num_groups", [0, 11, 6])
def test_scales_that_do_not_fit_are_refused(num_groups: int) -> None:
    """6 groups of 2 channels would leave the last one without any."""
    codes = torch.zeros(2, 10, dtype=torch.int8)
    with pytest.raises(
        ValueError, match=r"scales of shape|10 channels do not divide into 6 groups"
    ):
        from_int8(codes, torch.ones(2, num_groups, dtype=torch.bfloat16))


def test_outlier_channels_spoil_a_tokens_scale_but_only_their_own_groups() -> None:
    """Four channels of 896 that are 40 times as large, as language models have them."""
    states = torch.randn(64, 896, generator=torch.Generator().manual_seed(0))
    plain = largest_relative_error(states, from_int8(*to_int8(states, 896)))
    states[:, ::224] *= 40
    whole = largest_relative_error(states, from_int8(*to_int8(states, 896)))
    groups = largest_relative_error(states, from_int8(*to_int8(states, 64)))
    assert plain < 0.02
    assert whole > 0.04
    assert groups < 0.02


def _vlad_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    """Gradient of the smooth-L1 distance (beta 1) by the student's cosines."""
    cosine = student.clone().requires_grad_()
    functional.smooth_l1_loss(cosine, teacher).backward()
    assert cosine.grad is not None
    return cosine.grad


@pytest.mark.parametrize("common", [0.0, 1.0])
@pytest.mark.parametrize("gap", [0.04, 0.1])
def test_int8_cosines_move_vlads_gradient_by_less_than_one_and_a_half_percent(
    common: float, gap: float
) -> None:
    """The worst case of docs: small cosines, with or without a common mean, and a good student."""
    generator = torch.Generator().manual_seed(0)
    shared = common * torch.randn(1, 896, generator=generator)
    vision = torch.randn(576, 896, generator=generator) + shared
    nearest = torch.randint(576, (64,), generator=generator)
    text = vision[nearest] * 0.3 + torch.randn(64, 896, generator=generator) + shared
    teacher = cosine_affinity(text, vision)
    student = teacher + gap * torch.randn(teacher.shape, generator=generator)
    stored = from_scale(*to_scale(teacher))
    assert largest_error(teacher, stored) <= 0.002
    exact, found = _vlad_gradient(student, teacher), _vlad_gradient(student, stored)
    assert float((found - exact).norm() / exact.norm()) <= 0.015
