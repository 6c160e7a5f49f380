"""Projects many vision features to few language-model inputs.

A compressing projector takes the vision tower's patch features [B, side * side, C] of square images
(without class token) and returns [B, pooled * pooled, D]: B images or tiles, C width of the vision
features, D width of the language model. Each projector subclasses the family's own without adding
or renaming parameters, so that the weights of a vanilla checkpoint fit.
"""

import math
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector


def grid_side(config: PreTrainedConfig) -> int:
    """Return the patches per side of the images of a LLaVA-family model's vision tower."""
    vision: Any = config.vision_config
    return vision.image_size // vision.patch_size


def pooled_side(side: int, stride: int) -> int:
    """Return the side of a grid after pooling by `stride`: floor(side / stride).

    LLaVA processors count placeholders as floor(pixels / (patch * stride)), which is the same
    number: floors of quotients nest.
    """
    if not 1 <= stride <= side:
        raise ValueError(
            f"vision_pool_stride is {stride} on a grid of {side} x {side} vision tokens; choose a "
            f"stride from 1 (no pooling) to {side} (one token)"
        )
    return side // stride


def average_pool(features: Float[Tensor, "B n C"], stride: int) -> Float[Tensor, "B m C"]:
    """Average features over a square grid down to floor(side / stride) per side.

    Adaptive average pooling (DeCo, arXiv 2405.20985): output cell i covers rows
    floor(i * side / pooled) to ceil((i + 1) * side / pooled), so that every feature is used, also
    where the stride does not divide the side. Stride 1 returns the same bits. ValueError where n is
    not a square number.
    """
    num_features = features.shape[1]
    side = math.isqrt(num_features)
    if side * side != num_features:
        raise ValueError(
            f"found {num_features} vision features per image, expected a square grid (such as "
            f"{side} x {side} = {side * side}); set vision_feature_select_strategy to 'default' "
            "for vision towers with a class token (CLIP) and to 'full' for those without (SigLIP)"
        )
    grid_BCss = features.transpose(1, 2).unflatten(2, (side, side))
    pooled_BCpp = F.adaptive_avg_pool2d(grid_BCss, pooled_side(side, stride))
    return pooled_BCpp.flatten(2).transpose(1, 2)


class _AveragePooling(nn.Module):
    """Pools, then projects: the family's MLP runs on few features (DeCo)."""

    def __init__(self, config: PreTrainedConfig, stride: int) -> None:
        super().__init__(config)
        self.stride = stride

    def pooled_side(self, side: int) -> int:
        """Return the side of the output grid for an input grid of side x side."""
        return pooled_side(side, self.stride)

    def forward(self, image_features: Float[Tensor, "B n C"]) -> Float[Tensor, "B m D"]:
        return super().forward(average_pool(image_features, self.stride))


class AvgPoolLlavaProjector(_AveragePooling, LlavaMultiModalProjector):
    """Average pooling, then LLaVA's two-layer projector."""


class AvgPoolLlavaNextProjector(_AveragePooling, LlavaNextMultiModalProjector):
    """Average pooling of each tile, then LLaVA-NeXT's two-layer projector."""
