"""LLaVA with a pooling projector, under the model type emkd_avgpool_llava.

Every parameter keeps its name. The model type is ours because a checkpoint of type "llava" would
load as the stock class, without pooling and without a warning. Importing this module registers both
classes with transformers. The configuration refuses a stride larger than the grid.
"""

from typing import no_type_check

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
)

from student_train.models.projectors import AvgPoolLlavaProjector, grid_side, pooled_side


@no_type_check  # tests check signatures; transformers wraps __init__ to take more than its own
class AvgPoolLlavaConfig(LlavaConfig):
    """LLaVA's configuration and the stride by which vision tokens are pooled."""

    model_type = "emkd_avgpool_llava"

    vision_pool_stride: int = 2
    """Pooled grid side = floor(side / stride); 1 is the vanilla model."""

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        pooled_side(grid_side(self), self.vision_pool_stride)


class AvgPoolLlavaModel(LlavaModel):
    """LLaVA's backbone with average pooling before its projector."""

    config_class = AvgPoolLlavaConfig

    def __init__(self, config: AvgPoolLlavaConfig) -> None:
        super().__init__(config)
        self.multi_modal_projector = AvgPoolLlavaProjector(config, config.vision_pool_stride)
        self.post_init()


class AvgPoolLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with average pooling before its projector and its language-model head."""

    config_class = AvgPoolLlavaConfig

    def __init__(self, config: AvgPoolLlavaConfig) -> None:
        super().__init__(config)
        self.model = AvgPoolLlavaModel(config)
        self.post_init()


AutoConfig.register(AvgPoolLlavaConfig.model_type, AvgPoolLlavaConfig)
AutoModelForImageTextToText.register(AvgPoolLlavaConfig, AvgPoolLlavaForConditionalGeneration)
