"""Makes a student from a vanilla model, and loads students from disk.

`vanilla_student` loads a model of any family unchanged. `student_from_vanilla` puts a compressing
projector into a LLaVA or LLaVA-NeXT, weights unchanged, and gives its processor the pooled patch
size, so that it emits one placeholder per vision token. Refused before training: other families,
class tokens that break the grid, processors whose image size, tiles or placeholder count differ
from the model's. Remote code is never run.
"""

import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import LlavaNextProcessor, LlavaProcessor, PreTrainedModel, ProcessorMixin

from student_train.models.avgpool_llava import (
    AvgPoolLlavaConfig,
    AvgPoolLlavaForConditionalGeneration,
)
from student_train.models.avgpool_llava_next import (
    AvgPoolLlavaNextConfig,
    AvgPoolLlavaNextForConditionalGeneration,
)
from student_train.models.projectors import grid_side, pooled_side
from teacher_cache.encoding.view_geometry import require_supported
from teacher_cache.models.checkpoint import ProcessorCheck, load_config, load_model

logger = logging.getLogger(__name__)

ProjectorName = Literal["avgpool", "none"]
LoadedStudent = tuple[PreTrainedModel, ProcessorMixin]

CLASS_TOKEN_NAMES = ("class_embedding", "cls_token")
"""Parameter names of class tokens in transformers' vision towers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentFamily:
    """The classes of a student: one vanilla model type with one projector."""

    projector: Literal["avgpool"]
    vanilla_type: str
    config_class: type[AvgPoolLlavaConfig] | type[AvgPoolLlavaNextConfig]
    model_class: type[PreTrainedModel]
    processor_class: type[Any]


FAMILIES = (
    StudentFamily(
        projector="avgpool",
        vanilla_type="llava",
        config_class=AvgPoolLlavaConfig,
        model_class=AvgPoolLlavaForConditionalGeneration,
        processor_class=LlavaProcessor,
    ),
    StudentFamily(
        projector="avgpool",
        vanilla_type="llava_next",
        config_class=AvgPoolLlavaNextConfig,
        model_class=AvgPoolLlavaNextForConditionalGeneration,
        processor_class=LlavaNextProcessor,
    ),
)


def student_from_vanilla(
    path: str,
    projector: Literal["avgpool"] = "avgpool",
    stride: int = 2,
    dtype: torch.dtype | None = None,
) -> LoadedStudent:
    """Load a vanilla model as a student that pools its vision tokens by stride x stride.

    `path` is a local folder or hub id of a LLaVA or LLaVA-NeXT checkpoint, or of a student made by
    this function, which is loaded unchanged (its stride must be `stride`). `dtype` defaults to the
    checkpoint's. The model is in eval mode on the CPU. ValueError for other families and where the
    processor's placeholders and the model's vision tokens would differ.
    """
    config: Any = load_config(path)
    families = [family for family in FAMILIES if family.projector == projector]
    for family in families:
        if config.model_type == family.config_class.model_type:
            if config.vision_pool_stride != stride:
                raise ValueError(
                    f"{path} is a student with vision_pool_stride {config.vision_pool_stride}, "
                    f"but stride is {stride}; pass --stride {config.vision_pool_stride} "
                    "or start from a vanilla model"
                )
            return load_student(path, dtype)
        if config.model_type == family.vanilla_type:
            return _convert(path, family, stride, dtype)
    supported = sorted({family.vanilla_type for family in families})
    raise ValueError(
        f"{path} has model type {config.model_type!r}; students with projector {projector!r} are "
        f"made from {', '.join(supported)} (or from a student of these); projector 'none' keeps "
        "all vision tokens of any family, to be dropped inside the language model"
    )


def vanilla_student(path: str, dtype: torch.dtype | None = None) -> LoadedStudent:
    """Load a vanilla model as a student with all its vision tokens, class and weights unchanged.

    ValueError for families whose vision tokens are unknown, and for students whose projector pools.
    """
    model_type = load_config(path).model_type
    if any(model_type == family.config_class.model_type for family in FAMILIES):
        raise ValueError(
            f"{path} is a student that pools its vision tokens ({model_type}), but projector "
            "'none' trains a vanilla model; take projector 'avgpool' and its stride"
        )
    require_supported(model_type)
    return load_student(path, dtype)


def load_student(
    path: str, dtype: torch.dtype | None = None, check: ProcessorCheck | None = None
) -> LoadedStudent:
    """Load any image-text-to-text model with its processor, students and vanilla models alike.

    `dtype` defaults to the checkpoint's. The model is in eval mode, on the CPU. ValueError where
    weights are missing (transformers would use random ones) and where a student's processor does
    not fit it. `check` gets processor and config before weights are opened.
    """
    model, processor = load_model(path, dtype, check=check)
    if any(isinstance(model.config, family.config_class) for family in FAMILIES):
        _require_placeholders_match(path, model, processor)
    return model, processor


def _convert(
    path: str, family: StudentFamily, stride: int, dtype: torch.dtype | None
) -> LoadedStudent:
    loaded: Any = load_student(path, dtype)
    vanilla, processor = loaded
    if type(processor) is not family.processor_class:
        raise ValueError(
            f"{path} has a {type(processor).__name__}, expected {family.processor_class.__name__}; "
            "its vision tower has no fixed square grid to pool"
        )
    _require_square_grid(path, vanilla)
    fields = vanilla.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    fields["image_seq_length"] = pooled_side(grid_side(vanilla.config), stride) ** 2
    config: Any = family.config_class(**fields, vision_pool_stride=stride)
    # transformers' own loader ties heads, fills buffers and reports every key.
    loaded = family.model_class.from_pretrained(
        None,
        config=config,
        state_dict=vanilla.state_dict(),
        dtype=vanilla.dtype,
        output_loading_info=True,
    )
    model, info = loaded
    unmatched = sorted({*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]})
    assert not unmatched, f"the student's parameters are not the vanilla model's: {unmatched}"
    model.generation_config = vanilla.generation_config
    processor.patch_size = config.vision_config.patch_size * stride
    _require_placeholders_match(path, model, processor)
    logger.info("%s becomes a %s with stride %d", path, config.model_type, stride)
    return model.eval(), processor


def _require_square_grid(path: str, vanilla: PreTrainedModel) -> None:
    """Refuse a feature selection that keeps the class token, or drops a patch in its place."""
    names = [name for name, _ in vanilla.get_submodule("model.vision_tower").named_parameters()]
    has_class_token = any(name.rpartition(".")[2] in CLASS_TOKEN_NAMES for name in names)
    found = vanilla.config.vision_feature_select_strategy
    expected = "default" if has_class_token else "full"
    if found != expected:
        raise ValueError(
            f"{path} has vision_feature_select_strategy {found!r}, expected {expected!r}: its "
            f"{vanilla.config.vision_config.model_type} has {'a' if has_class_token else 'no'} "
            "class token, and pooling needs the square grid of patches alone"
        )


def _require_placeholders_match(path: str, model: PreTrainedModel, processor: Any) -> None:
    """Refuse a processor that does not emit one placeholder per vision token of the student.

    Encodes one blank image. One is enough: with equal image size, class token and tiles, both sides
    count by one formula (tests sweep it over image sizes and strides).
    """
    config = model.config
    vision = config.vision_config
    side = pooled_side(grid_side(config), config.vision_pool_stride)
    blank = np.zeros((vision.image_size, 2 * vision.image_size, 3), dtype=np.uint8)
    images = processor.image_processor(images=[blank], return_tensors="pt")
    facts: list[tuple[str, object, object]] = [
        ("image token id", processor.image_token_id, config.image_token_id),
        (
            "height and width of the pixels",
            list(images["pixel_values"].shape[-2:]),
            [vision.image_size, vision.image_size],
        ),
    ]
    num_features = side * side
    if isinstance(model, AvgPoolLlavaNextForConditionalGeneration):
        tiles = [torch.zeros(images["pixel_values"].shape[1], num_features, 1)]
        strategy = config.vision_feature_select_strategy
        packed, _ = model.pack_image_features(
            tiles, images["image_sizes"], strategy, torch.zeros(1)
        )
        num_features = len(packed[0])
        pinpoints = processor.image_processor.image_grid_pinpoints
        facts.append(
            (
                "image_grid_pinpoints",
                sorted(list(size) for size in pinpoints),
                sorted(list(size) for size in config.image_grid_pinpoints),
            )
        )
    num_placeholders = processor.replace_image_token(images, 0).count(processor.image_token)
    facts.append(("placeholders of a blank image", num_placeholders, num_features))
    wrong = [
        f"  {what}: processor {has}, model {wants}" for what, has, wants in facts if has != wants
    ]
    if wrong:
        raise ValueError(
            f"{path}: the processor does not fit the model:\n" + "\n".join(wrong) + "\ncorrect "
            "its preprocessor / processor configuration (patch_size, num_additional_image_tokens, "
            "vision_feature_select_strategy, size, image_grid_pinpoints)"
        )
