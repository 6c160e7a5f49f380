"""Average pooling keeps its promises: window means, stride 1 is nothing, only square grids."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.lazy import (
    AvgPoolLlavaNextProjector,
    AvgPoolLlavaProjector,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaMultiModalProjector,
    LlavaNextConfig,
    LlavaNextMultiModalProjector,
    average_pool,
    pooled_side,
)


def window_means(features: Tensor, stride: int) -> Tensor:
    """The definition, one window at a time."""
    num_images, num_features, width = features.shape
    side = math.isqrt(num_features)
    pooled = side // stride
    means = torch.zeros(num_images, pooled * pooled, width, dtype=features.dtype)
    for image in range(num_images):
        for row in range(pooled):
            for column in range(pooled):
                members = [
                    features[image, i * side + j]
                    for i in range(row * side // pooled, -(-(row + 1) * side // pooled))
                    for j in range(column * side // pooled, -(-(column + 1) * side // pooled))
                ]
                means[image, row * pooled + column] = torch.stack(members).mean(0)
    return means


@settings(deadline=None, max_examples=40)
@given(side=st.integers(1, 9), data=st.data())
def test_each_token_is_the_mean_of_its_window(side: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, side))
    features = torch.randn(2, side * side, 3, dtype=torch.float64)
    pooled = average_pool(features, stride)
    assert pooled.shape == (2, (side // stride) ** 2, 3)
    torch.testing.assert_close(pooled, window_means(features, stride), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stride_one_returns_the_same_bits(dtype: torch.dtype) -> None:
    features = torch.randn(3, 25, 7).to(dtype)
    assert torch.equal(average_pool(features, 1), features)


@given(pixels=st.integers(1, 2000), patch=st.integers(1, 40), stride=st.integers(1, 40))
def test_a_processor_with_a_larger_patch_counts_the_same(
    pixels: int, patch: int, stride: int
) -> None:
    side = pixels // patch
    if stride <= side:
        assert pooled_side(side, stride) == pixels // (patch * stride)


def test_a_class_token_left_in_is_refused() -> None:
    with pytest.raises(ValueError, match=r"577 vision features.*24 x 24.*'default'"):
        average_pool(torch.zeros(1, 577, 2), 2)


@pytest.mark.parametrize("stride", [0, -1, 25])
def test_strides_off_the_grid_are_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=rf"vision_pool_stride is {stride} on a grid of 24 x 24"):
        pooled_side(24, stride)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_weights_of_the_vanilla_projector_fit_and_the_mlp_sees_pooled_features(
    num_layers: int,
) -> None:
    layer: int | list[int] = -2 if num_layers == 1 else [-2, -1]
    vision, text = CLIPVisionConfig(hidden_size=12), LlamaConfig(hidden_size=64)
    llava = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=layer)
    following = LlavaNextConfig(vision_config=vision, text_config=text, vision_feature_layer=layer)
    for vanilla, pooling in (
        (LlavaMultiModalProjector(llava), AvgPoolLlavaProjector(llava, 3)),
        (LlavaNextMultiModalProjector(following), AvgPoolLlavaNextProjector(following, 3)),
    ):
        pooling.load_state_dict(vanilla.state_dict())
        assert list(pooling.state_dict()) == list(vanilla.state_dict())
        features = torch.randn(2, 49, 12 * num_layers)
        torch.testing.assert_close(pooling(features), vanilla(window_means(features, 3)))
        assert pooling.pooled_side(7) == 2
