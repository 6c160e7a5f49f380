"""Grids and newlines against what the models themselves put at the placeholders."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.encoding.view_geometry import (
    Block,
    ImageInputs,
    layout_images,
    register_geometry,
)
from teacher_cache.models.processors import load_processor
from teacher_cache.schema.samples import IMAGE_PLACEHOLDER, Message, Sample, make_sample
from tests.conftest import TinyFolder
from tests.support.lazy import (
    AutoModelForImageTextToText,
    get_anyres_image_grid_shape,
    unpad_image,
)
from tests.support.tiny import tiny_image, tiny_llava, tiny_llava_next

Size = tuple[int, int]


def _sample(*sizes: Size) -> Sample:
    images = [tiny_image(i, width=w, height=h) for i, (w, h) in enumerate(sizes)]
    text = f"{IMAGE_PLACEHOLDER}\n" * len(sizes) + "what?"
    answer = Message(role="assistant", text="two.")
    return make_sample("s", images, [Message(role="user", text=text), answer])


def _grids(folder: Path, sample: Sample) -> tuple[list[tuple[int, int, int, int]], Any, Any]:
    """(image, view, rows, cols) of every view; the model; the encoded sample."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    encoder = SampleEncoder(load_processor(str(folder)), model.config)
    encoded = encoder.encode(sample)
    views = encoded.spans.views
    return [(v.image, v.view, v.rows, v.cols) for v in views], model, encoded


def _newlines_of_model(model: Any, encoded: Any) -> list[int]:
    """Positions where the model puts its newline embedding, found among its own features."""
    names = ("pixel_values", "image_sizes", "batch_num_images")
    inputs = {name: encoded.inputs[name] for name in names if name in encoded.inputs}
    with torch.no_grad():
        features = torch.cat(list(model.get_image_features(**inputs).pooler_output))
    token, newline = model.config.image_token_id, model.model.image_newline
    ids = encoded.inputs["input_ids"].tolist()
    placeholders = [p for p, i in enumerate(ids) if i == token]
    assert len(placeholders) == len(features)
    return [p for p, f in zip(placeholders, features, strict=True) if torch.equal(f, newline)]


@pytest.mark.parametrize("tower", ["siglip", "clip"])
@pytest.mark.parametrize("sizes", [[(24, 16)], [(16, 40), (30, 30)], [(9, 60)], [(64, 7), (20, 8)]])
def test_llava_next_newlines_are_where_the_model_puts_them(
    sizes: list[Size], tower: str, tmp_path: Path
) -> None:
    folder = tiny_llava_next(tmp_path, vision=tower)
    grids, model, encoded = _grids(folder, _sample(*sizes))
    newlines = _newlines_of_model(model, encoded)
    ids, token = encoded.inputs["input_ids"].tolist(), model.config.image_token_id
    vision = [p for p, i in enumerate(ids) if i == token and p not in newlines]
    assert encoded.spans.vision.tolist() == vision
    assert [grid[:2] for grid in grids] == [(i, v) for i in range(len(sizes)) for v in (0, 1)]
    assert len(newlines) == sum(rows for _, view, rows, _ in grids if view == 1)


@pytest.mark.parametrize("sizes", [[(24, 16)], [(40, 40)], [(16, 40), (30, 30)]])
def test_llava_onevision_newlines_are_where_the_model_puts_them(
    sizes: list[Size], tiny_folder: TinyFolder
) -> None:
    grids, model, encoded = _grids(tiny_folder("llava_onevision"), _sample(*sizes))
    newlines = _newlines_of_model(model, encoded)
    ids, token = encoded.inputs["input_ids"].tolist(), model.config.image_token_id
    vision = [p for p, i in enumerate(ids) if i == token and p not in newlines]
    assert encoded.spans.vision.tolist() == vision
    if len(sizes) > 1:
        assert grids == [(0, 0, 4, 4), (1, 0, 4, 4)]
        assert len(newlines) == 2
    elif sizes == [(40, 40)]:  # 8x8 = 4 tiles, above the cap of 2 tiles
        assert grids == [(0, 0, 4, 4), (0, 1, 5, 5)]


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_llava_has_one_grid_per_image(tower: str, tmp_path: Path) -> None:
    grids, _, _ = _grids(tiny_llava(tmp_path, vision=tower), _sample((24, 16), (16, 40)))
    assert grids == [(0, 0, 4, 4), (1, 0, 4, 4)]


def test_qwen_grids_follow_the_images(tiny_folder: TinyFolder) -> None:
    grids, _, encoded = _grids(tiny_folder("qwen2_5_vl"), _sample((24, 16), (16, 40)))
    assert grids == [(0, 0, 2, 3), (1, 0, 5, 2)]
    assert encoded.inputs["image_grid_thw"].tolist() == [[1, 4, 6], [1, 10, 4]]


@pytest.mark.parametrize("family", ["internvl", "idefics3"])
def test_tiles_come_first_and_the_whole_image_last(family: str, tiny_folder: TinyFolder) -> None:
    grids, _, encoded = _grids(tiny_folder(family), _sample((32, 16), (16, 16)))
    views = [view for image, view, _, _ in grids if image == 0]
    assert views == [*range(1, len(views)), 0]
    assert all(grid[2:] == (2, 2) for grid in grids)
    pixels = encoded.inputs["pixel_values"].flatten(0, -4)
    assert len(grids) == len(pixels)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_pooled_students_have_the_same_views_on_a_coarser_grid(stride: int) -> None:
    vision = SimpleNamespace(patch_size=4, image_size=24)
    config = SimpleNamespace(
        model_type="emkd_avgpool_llava", vision_config=vision, vision_pool_stride=stride
    )
    side = 6 // stride
    inputs = ImageInputs(
        tensors={"pixel_values": torch.zeros(1, 3, 24, 24)},
        placeholders=(side * side,),
        replacements=("",),
    )
    [layout] = layout_images(config, inputs)
    assert [(v.rows, v.cols) for v in layout.views] == [(side, side)]
    config.model_type = "emkd_avgpool_llava_next"
    config.image_grid_pinpoints = [[24, 48], [48, 24]]
    anyres = ImageInputs(
        tensors={"image_sizes": torch.tensor([[24, 48]])},
        placeholders=(side * side + side * (2 * side + 1),),
        replacements=("",),
    )
    [layout] = layout_images(config, anyres)
    assert [(v.rows, v.cols) for v in layout.views] == [(side, side), (side, 2 * side)]
    assert int((~layout.is_vision).sum()) == side


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([1, 2, 4, 8]))
@settings(deadline=None)
def test_mosaics_are_unpadded_as_the_model_unpads_them(height: int, width: int, patch: int) -> None:
    pinpoints, side = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]], 16 // patch
    rows, cols = get_anyres_image_grid_shape((height, width), pinpoints, 16)
    kept = unpad_image(torch.zeros(1, rows * side, cols * side), (height, width)).shape[1:]
    assume(0 not in kept)
    config = SimpleNamespace(
        model_type="llava_next",
        image_grid_pinpoints=pinpoints,
        vision_config=SimpleNamespace(image_size=16, patch_size=patch),
    )
    inputs = ImageInputs(
        tensors={"image_sizes": torch.tensor([[height, width]])},
        placeholders=(side * side + kept[0] * (kept[1] + 1),),
        replacements=("",),
    )
    [layout] = layout_images(config, inputs)
    assert (layout.views[1].rows, layout.views[1].cols) == tuple(kept)


@pytest.mark.parametrize("newline", ["none", "after_rows", "after_view"])
def test_newlines_stand_behind_rows_or_the_view(newline: Any) -> None:
    block = Block(view=0, rows=2, cols=3, newline=newline)
    pictures = {"none": "vvvvvv", "after_rows": "vvv-vvv-", "after_view": "vvvvvv-"}
    drawn = "".join("v" if is_vision else "-" for is_vision in block.is_vision().tolist())
    assert drawn == pictures[newline]


def test_another_family_is_one_function() -> None:
    def squares(_config: Any, inputs: ImageInputs) -> list[list[Block]]:
        return [[Block(view=0, rows=2, cols=2)] for _ in inputs.placeholders]

    register_geometry(["squares"], squares)
    config = SimpleNamespace(model_type="squares")
    inputs = ImageInputs(tensors={}, placeholders=(4, 4), replacements=("", ""))
    assert len(layout_images(config, inputs)) == 2
    one_off = ImageInputs(tensors={}, placeholders=(5, 3), replacements=("", ""))
    with pytest.raises(ValueError, match="image 0 has 5 placeholder tokens, expected 4"):
        layout_images(config, one_off)


def _qwen_video(config: Any) -> ImageInputs:
    config.vision_config = SimpleNamespace(spatial_merge_size=2)
    grid = torch.tensor([[2, 4, 4]])
    return ImageInputs(tensors={"image_grid_thw": grid}, placeholders=(8,), replacements=("",))


def _two_images_for_one(config: Any) -> ImageInputs:
    config.vision_config = SimpleNamespace(spatial_merge_size=2)
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    return ImageInputs(tensors={"image_grid_thw": grid}, placeholders=(8,), replacements=("",))


@pytest.mark.parametrize(
    ("make", "reason"),
    [(_qwen_video, "videos are not supported"), (_two_images_for_one, "made inputs for 2")],
)
def test_inputs_that_do_not_add_up_are_refused(
    make: Callable[[Any], ImageInputs], reason: str
) -> None:
    config = SimpleNamespace(model_type="qwen2_vl")
    with pytest.raises(ValueError, match=reason):
        layout_images(config, make(config))
