"""Affinity: the cosine, with gradients, whatever the dtype, also of nothing."""

import math

import pytest
import torch

from teacher_cache.records.affinity import cosine_affinity


def test_affinity_is_the_cosine_of_every_pair() -> None:
    torch.manual_seed(0)
    text = torch.randn(3, 5, dtype=torch.float64)
    vision = torch.randn(4, 5, dtype=torch.float64)
    affinity = cosine_affinity(text, vision)
    for x in range(3):
        for m in range(4):
            dot = sum(float(a) * float(b) for a, b in zip(text[x], vision[m], strict=True))
            norms = math.hypot(*text[x].tolist()) * math.hypot(*vision[m].tolist())
            assert float(affinity[x, m]) == pytest.approx(dot / norms, abs=1e-12)


def test_half_precision_states_give_float32_affinities() -> None:
    states = torch.randn(3, 8).to(torch.bfloat16)
    affinity = cosine_affinity(states, states)
    assert affinity.dtype == torch.float32
    torch.testing.assert_close(affinity.diagonal(), torch.ones(3))


def test_empty_and_zero_states_have_affinities_and_gradients() -> None:
    assert cosine_affinity(torch.zeros(0, 4), torch.ones(2, 4)).shape == (0, 2)
    assert cosine_affinity(torch.ones(2, 4), torch.zeros(0, 4)).shape == (2, 0)
    text = torch.zeros(1, 4, requires_grad=True)
    vision = torch.ones(2, 4, requires_grad=True)
    affinity = cosine_affinity(text, vision)
    assert not affinity.any()
    torch.autograd.backward(affinity.sum())
    assert text.grad is not None
    assert vision.grad is not None
    assert bool(torch.isfinite(text.grad).all())
