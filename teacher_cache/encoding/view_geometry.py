"""Where the vision tokens of each model family lie: the grid of every view, and the newlines.

Promise: for each image, the placeholders that its processor wrote are told apart into views
(rectangles of vision tokens, raster order) and newline positions, from the model's config and the
image inputs alone. A newline is a learned embedding at a placeholder position; it belongs to no
grid, is not a vision token and takes no part in matching. Counts that differ from the family's
geometry are refused, image by image (transformers checks the batch's total only).

A new family is one function from (config, image inputs) to blocks, given to `register_geometry`.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from teacher_cache.schema.samples import ViewGrid


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInputs:
    """What is known of one sample's images after its processor ran.

    `tensors` are the processor's outputs for this sample, `placeholders` the number of image
    placeholder tokens of each image, `replacements` the text that stands for each image.
    """

    tensors: Mapping[str, Tensor]
    placeholders: tuple[int, ...]
    replacements: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One view as it lies in the sequence: its grid and the newline positions among it."""

    view: int
    rows: int
    cols: int
    newline: Literal["none", "after_rows", "after_view"] = "none"

    @property
    def num_positions(self) -> int:
        """Placeholders of this view, newlines included."""
        newlines = {"none": 0, "after_rows": self.rows, "after_view": 1}
        return self.rows * self.cols + newlines[self.newline]

    def is_vision(self) -> Bool[Tensor, " positions"]:
        """Which of the positions are vision tokens (the others are newlines)."""
        mask = torch.ones(self.num_positions, dtype=torch.bool)
        if self.newline == "after_rows":
            mask[self.cols :: self.cols + 1] = False
        elif self.newline == "after_view":
            mask[-1] = False
        return mask


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLayout:
    """One image: its views in sequence order, and which of its placeholders are vision tokens."""

    views: tuple[ViewGrid, ...]
    is_vision: Bool[Tensor, " placeholders"]


Geometry = Callable[[Any, ImageInputs], list[list[Block]]]
"""From a model's config and a sample's image inputs to the blocks of each image."""

_GEOMETRIES: dict[str, Geometry] = {}


def register_geometry(model_types: Iterable[str], geometry: Geometry) -> None:
    """Teach this module one more model family."""
    for model_type in model_types:
        _GEOMETRIES[model_type] = geometry


def require_supported(model_type: str) -> None:
    """ValueError that lists the supported families unless `model_type` is one of them."""
    if model_type not in _GEOMETRIES:
        raise ValueError(
            f"models of type {model_type!r} are not supported: where their vision tokens lie is "
            f"unknown; supported: {', '.join(sorted(_GEOMETRIES))}. Another family needs one "
            "function, given to register_geometry in a module of yours: --plugin MODULE "
            "(docs/families.md)"
        )


def layout_images(config: Any, inputs: ImageInputs) -> tuple[ImageLayout, ...]:
    """The layout of every image of one sample; ValueError where a count does not add up."""
    require_supported(config.model_type)
    if not inputs.placeholders:
        return ()
    images = _GEOMETRIES[config.model_type](config, inputs)
    if len(images) != len(inputs.placeholders):
        raise ValueError(
            f"the text has placeholders for {len(inputs.placeholders)} images, "
            f"the processor made inputs for {len(images)}"
        )
    layouts: list[ImageLayout] = []
    for image, (blocks, found) in enumerate(zip(images, inputs.placeholders, strict=True)):
        for block in blocks:
            if min(block.rows, block.cols) < 1:
                raise ValueError(
                    f"image {image} is too narrow: its view {block.view} would hold "
                    f"{block.rows}x{block.cols} vision tokens; crop it or leave the sample out"
                )
        expected = sum(block.num_positions for block in blocks)
        if found != expected:
            raise ValueError(
                f"image {image} has {found} placeholder tokens, expected {expected} from "
                f"{_describe(blocks)}; the processor's settings (patch size, feature selection, "
                "tile grid) do not belong to this model"
            )
        views = [
            ViewGrid(image=image, view=block.view, rows=block.rows, cols=block.cols)
            for block in blocks
        ]
        mask = torch.cat([block.is_vision() for block in blocks])
        layouts.append(ImageLayout(views=tuple(views), is_vision=mask))
    return tuple(layouts)


def _describe(blocks: list[Block]) -> str:
    return " + ".join(f"{b.rows}x{b.cols} ({b.newline} newline)" for b in blocks)


def _pool_stride(config: Any) -> int:
    """Side of the pooling window of this project's students; 1 for every other model."""
    return int(config.vision_pool_stride) if config.model_type.startswith("emkd_avgpool_") else 1


def _llava(config: Any, inputs: ImageInputs) -> list[list[Block]]:
    patch = config.vision_config.patch_size * _pool_stride(config)
    num_images, _, height, width = inputs.tensors["pixel_values"].shape
    return [[Block(view=0, rows=height // patch, cols=width // patch)] for _ in range(num_images)]


def _unpadded(rows: int, cols: int, height: int, width: int) -> tuple[int, int]:
    """Grid left of a `rows` x `cols` mosaic when the padding of the image is cut off.

    The arithmetic, rounding included, is that of `unpad_image` of LLaVA-NeXT.
    """
    if width / height > cols / rows:
        kept = int(round(height * (cols / width), 7))
        return rows - 2 * ((rows - kept) // 2), cols
    kept = int(round(width * (rows / height), 7))
    return rows, cols - 2 * ((cols - kept) // 2)


def _mosaic(config: Any, side: int, size: Tensor) -> tuple[int, int]:
    from transformers.image_processing_utils import select_best_resolution

    height, width = (int(value) for value in size)
    tile = config.vision_config.image_size
    best_height, best_width = select_best_resolution((height, width), config.image_grid_pinpoints)
    return _unpadded(best_height // tile * side, best_width // tile * side, height, width)


def _side(config: Any) -> int:
    vision = config.vision_config
    return vision.image_size // vision.patch_size // _pool_stride(config)


def _llava_next(config: Any, inputs: ImageInputs) -> list[list[Block]]:
    side = _side(config)
    base = Block(view=0, rows=side, cols=side)
    images: list[list[Block]] = []
    for size in inputs.tensors["image_sizes"]:
        rows, cols = _mosaic(config, side, size)
        images.append([base, Block(view=1, rows=rows, cols=cols, newline="after_rows")])
    return images


def _llava_onevision(config: Any, inputs: ImageInputs) -> list[list[Block]]:
    side = _side(config)
    sizes = inputs.tensors["image_sizes"]
    if len(sizes) > 1:
        tile = Block(view=0, rows=side, cols=side, newline="after_view")
        return [[tile] for _ in sizes]
    rows, cols = _mosaic(config, side, sizes[0])
    max_tiles = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * cols / (max_tiles * side**2))
    if ratio > 1.1:
        rows, cols = int(rows // ratio), int(cols // ratio)
    base = Block(view=0, rows=side, cols=side)
    return [[base, Block(view=1, rows=rows, cols=cols, newline="after_rows")]]


def _qwen_vl(config: Any, inputs: ImageInputs) -> list[list[Block]]:
    merge = config.vision_config.spatial_merge_size
    images: list[list[Block]] = []
    for frames, height, width in inputs.tensors["image_grid_thw"].tolist():
        if frames != 1:
            raise ValueError(f"an image has one frame, found {frames}; videos are not supported")
        images.append([Block(view=0, rows=height // merge, cols=width // merge)])
    return images


def _tiles_then_whole(num_tiles: int, rows: int, cols: int) -> list[Block]:
    """Tiles 1..n in raster order, then the whole image as view 0; alone where it is not cut."""
    tiles = [Block(view=1 + tile, rows=rows, cols=cols) for tile in range(num_tiles)]
    return [*tiles, Block(view=0, rows=rows, cols=cols)]


def _internvl(config: Any, inputs: ImageInputs) -> list[list[Block]]:
    (height, width), (patch_height, patch_width) = (
        config.vision_config.image_size,
        config.vision_config.patch_size,
    )
    rows = int(height // patch_height * config.downsample_ratio)
    cols = int(width // patch_width * config.downsample_ratio)
    views = [found // (rows * cols) for found in inputs.placeholders]
    have = len(inputs.tensors["pixel_values"])
    if sum(views) != have:
        raise ValueError(
            f"the placeholders stand for {sum(views)} tiles of {rows}x{cols} tokens, "
            f"the processor made {have}"
        )
    return [_tiles_then_whole(num_views - 1, rows, cols) for num_views in views]


def _idefics3(config: Any, inputs: ImageInputs) -> list[list[Block]]:
    vision = config.vision_config
    side = vision.image_size // vision.patch_size // config.scale_factor
    tag = re.compile(r"<row_\d+_col_\d+>")
    return [_tiles_then_whole(len(tag.findall(text)), side, side) for text in inputs.replacements]


register_geometry(("llava", "emkd_avgpool_llava"), _llava)
register_geometry(("llava_next", "emkd_avgpool_llava_next"), _llava_next)
register_geometry(("llava_onevision",), _llava_onevision)
register_geometry(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), _qwen_vl)
register_geometry(("internvl",), _internvl)
register_geometry(("idefics3", "smolvlm"), _idefics3)
