"""A student's processor emits one placeholder per vision token, whatever the image's size."""

from functools import cache
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.lazy import (
    AvgPoolLlavaNextConfig,
    AvgPoolLlavaNextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextImageProcessor,
    LlavaNextModel,
    LlavaNextProcessor,
    image_size_to_num_patches,
    student_from_vanilla,
)
from tests.support.tiny import tiny_image, tiny_llava, tiny_llava_next, tokenizer

SIZES = [(16, 16), (24, 16), (17, 40), (40, 17), (5, 48), (48, 5), (31, 33), (64, 64), (3, 90)]
"""Width and height."""

TILE: dict[str, Any] = {"image_size": 336, "patch_size": 14}


@pytest.mark.parametrize("build", [tiny_llava, tiny_llava_next])
@pytest.mark.parametrize("vision", ["siglip", "clip"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_placeholders_equal_features(tmp_path: Path, build: Any, vision: str, stride: int) -> None:
    student: Any
    processor: Any
    student, processor = student_from_vanilla(str(build(tmp_path, vision)), "avgpool", stride)
    images = [Image.open(BytesIO(tiny_image(i, *size))) for i, size in enumerate(SIZES)]
    inputs = processor(
        images=images, text=["<image>"] * len(images), padding=True, return_tensors="pt"
    )
    counts = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    names = ("pixel_values", "image_sizes")
    with torch.no_grad():
        features = student.get_image_features(**{k: inputs[k] for k in names if k in inputs})
    assert [len(image) for image in features.pooler_output] == counts


@cache
def released_grid(stride: int) -> tuple[Any, Any]:
    """The tiles of the released models (336 pixels, patches of 14), in a narrow random model."""
    config: Any = AvgPoolLlavaNextConfig(
        vision_config=CLIPVisionConfig(hidden_size=12, num_hidden_layers=1, **TILE),
        text_config=LlamaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=8),
        vision_pool_stride=stride,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer=tokenizer({"image_token": "<image>"}),
        patch_size=14 * stride,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return AvgPoolLlavaNextModel(config), processor


@settings(deadline=None, max_examples=200)
@given(height=st.integers(20, 3000), width=st.integers(20, 3000), stride=st.integers(1, 24))
def test_any_image_and_stride_on_the_released_grid(height: int, width: int, stride: int) -> None:
    model, processor = released_grid(stride)
    pinpoints = model.config.image_grid_pinpoints
    num_tiles = image_size_to_num_patches((height, width), pinpoints, 336)
    features = [torch.randn(num_tiles, (24 // stride) ** 2, 2)]
    sizes, newline = torch.tensor([[height, width]]), torch.randn(2)
    packed, lengths = model.pack_image_features(features, sizes, "default", newline)

    images = {"image_sizes": sizes, "pixel_values": torch.empty(1, 1, 3, 336, 336)}
    placeholders = processor.replace_image_token(images, 0).count("<image>")
    assert lengths.tolist() == [len(packed[0])] == [placeholders]

    # The stock layout, told that patches are larger than they are.
    vision = SimpleNamespace(image_size=336, patch_size=14 * stride)
    stock = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints)
    )
    expected, _ = LlavaNextModel.pack_image_features(
        stock,  # pyright: ignore[reportArgumentType]
        features,
        sizes,
        "default",
        newline,
    )
    assert torch.equal(packed[0], expected[0])


def test_tiles_that_would_not_cover_the_image_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not all multiples of the vision tower's image_size 336"):
        AvgPoolLlavaNextConfig(
            vision_config=CLIPVisionConfig(**TILE), image_grid_pinpoints=[[336, 500]]
        )
