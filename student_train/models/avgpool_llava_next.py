"""LLaVA-NeXT (anyres) with a pooling projector, under the model type emkd_avgpool_llava_next.

Each tile of an image, base view included, is pooled by itself. The pooled tiles are then laid out
as the image, cropped to its aspect ratio and given one newline embedding per row, as by the vanilla
model, whose own layout takes a tile's side from the vision tower's patches. Importing this module
registers both classes with transformers. The configuration refuses a stride larger than the grid.
"""

from collections.abc import Sequence
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
)
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from student_train.models.projectors import AvgPoolLlavaNextProjector, grid_side, pooled_side


@no_type_check  # tests check signatures; transformers wraps __init__ to take more than its own
class AvgPoolLlavaNextConfig(LlavaNextConfig):
    """LLaVA-NeXT's configuration and the stride by which each tile's vision tokens are pooled."""

    model_type = "emkd_avgpool_llava_next"

    vision_pool_stride: int = 2
    """Pooled side of a tile = floor(side / stride); 1 is the vanilla model."""

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        pooled_side(grid_side(self), self.vision_pool_stride)
        vision: Any = self.vision_config
        tile = vision.image_size
        pinpoints: Any = self.image_grid_pinpoints
        if any(height % tile or width % tile for height, width in pinpoints):
            raise ValueError(
                f"image_grid_pinpoints {pinpoints} are not all multiples of the "
                f"vision tower's image_size {tile}; tiles would not cover the image"
            )


class AvgPoolLlavaNextModel(LlavaNextModel):
    """LLaVA-NeXT's backbone with average pooling before its projector."""

    config_class = AvgPoolLlavaNextConfig

    def __init__(self, config: AvgPoolLlavaNextConfig) -> None:
        super().__init__(config)
        self.multi_modal_projector = AvgPoolLlavaNextProjector(config, config.vision_pool_stride)
        self.post_init()

    def pack_image_features(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image_features: Sequence[Float[Tensor, "_ m D"]],
        image_sizes: Int[Tensor, "I 2"],
        vision_feature_select_strategy: str,
        image_newline: Float[Tensor, " D"],
    ) -> tuple[list[Float[Tensor, "_ D"]], Int[Tensor, " I"]]:
        """Lay pooled tiles out as rows of the image, a newline after each; base view first.

        `image_features[i]` holds image i's projected tiles, the base view first; `image_sizes` the
        original (height, width). Returns each image's embeddings in the order of its placeholders,
        and their numbers. The strategy is not read: it has already been applied.
        """
        side = self.multi_modal_projector.pooled_side(grid_side(self.config))
        vision: Any = self.config.vision_config
        packed: list[Tensor] = []
        for tiles_tmD, size in zip(image_features, image_sizes, strict=True):
            tile_rows, tile_columns = get_anyres_image_grid_shape(
                size, self.config.image_grid_pinpoints, vision.image_size
            )
            mosaic = tiles_tmD[1:].unflatten(1, (side, side))
            mosaic = mosaic.unflatten(0, (tile_rows, tile_columns)).permute(4, 0, 2, 1, 3)
            image_Dhw = unpad_image(mosaic.flatten(1, 2).flatten(2, 3), size)
            newline_Dh1 = image_newline[:, None, None].expand(-1, image_Dhw.shape[1], 1)
            rows_Dhw = torch.cat([image_Dhw, newline_Dh1.to(image_Dhw)], dim=2)
            packed.append(torch.cat([tiles_tmD[0], rows_Dhw.flatten(1).T]))
        lengths = [len(embeddings) for embeddings in packed]
        return packed, torch.tensor(lengths, device=image_newline.device)


class AvgPoolLlavaNextForConditionalGeneration(LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with average pooling before its projector and its language-model head."""

    config_class = AvgPoolLlavaNextConfig

    def __init__(self, config: AvgPoolLlavaNextConfig) -> None:
        super().__init__(config)
        self.model = AvgPoolLlavaNextModel(config)
        self.post_init()


AutoConfig.register(AvgPoolLlavaNextConfig.model_type, AvgPoolLlavaNextConfig)
AutoModelForImageTextToText.register(
    AvgPoolLlavaNextConfig, AvgPoolLlavaNextForConditionalGeneration
)
