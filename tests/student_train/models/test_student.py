"""Students keep the teacher's weights, save and load as themselves, and generate."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from student_train.config.recipe import TrainPart
from student_train.models.forward import final_hidden, output_head
from student_train.training.trainable import set_trainable
from tests.support.lazy import (
    AutoModelForImageTextToText,
    AutoProcessor,
    average_pool,
    load_student,
    student_from_vanilla,
)
from tests.support.tiny import FAMILIES, tiny_image, tiny_llava, tiny_llava_next

Folder = Callable[[str], Path]
VANILLA = ["llava-siglip", "llava-clip", "llava_next-siglip", "llava_next-clip"]


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Folder of a tiny vanilla model, by family and vision tower."""
    built: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in built:
            family, vision = name.split("-")
            build = tiny_llava if family == "llava" else tiny_llava_next
            built[name] = build(tmp_path_factory.mktemp(name), vision)
        return built[name]

    return folder


def load(folder: Path) -> tuple[Any, Any]:
    return load_student(str(folder))


def convert(folder: Path, stride: int) -> tuple[Any, Any]:
    return student_from_vanilla(str(folder), "avgpool", stride)


def edit(folder: Path, file: str, **changes: object) -> None:
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(settings | changes))


def picture(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    return Image.open(BytesIO(tiny_image(seed, width, height)))


def batch(processor: Any) -> dict[str, Tensor]:
    """Two images in the first row, one in the second, left padding."""
    return dict(
        processor(
            images=[[picture(0), picture(1, 16, 40)], [picture(2, 40, 17)]],
            text=["what is <image> and <image>?", "a red <image> square and a blue circle"],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
    )


def text_only(processor: Any) -> dict[str, Tensor]:
    return dict(processor(text=["what is two?"], return_tensors="pt"))


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("name", VANILLA)
def test_stride_one_is_the_vanilla_model_to_the_bit(vanilla: Folder, name: str) -> None:
    teacher, processor = load(vanilla(name))
    student, student_processor = convert(vanilla(name), 1)
    inputs = batch(processor)
    assert torch.equal(batch(student_processor)["input_ids"], inputs["input_ids"])
    assert torch.equal(logits(student, inputs), logits(teacher, inputs))


@pytest.mark.parametrize("name", VANILLA)
def test_every_weight_is_the_teachers_and_the_head_stays_tied(vanilla: Folder, name: str) -> None:
    teacher, _ = load(vanilla(name))
    student, _ = convert(vanilla(name), 2)
    assert not isinstance(teacher, type(student))
    expected, found = teacher.state_dict(), student.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert student.generation_config.to_dict() == teacher.generation_config.to_dict()
    assert not student.training


def test_the_checkpoint_decides_the_dtype_unless_one_is_given(
    vanilla: Folder, tmp_path: Path
) -> None:
    student, processor = student_from_vanilla(
        str(vanilla("llava-clip")), "avgpool", 2, torch.bfloat16
    )
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert load(tmp_path)[0].dtype == torch.bfloat16
    assert load_student(str(tmp_path), torch.float32)[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["llava-siglip", "llava-clip"])
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_the_language_model_receives_projected_window_means(
    vanilla: Folder, name: str, stride: int
) -> None:
    teacher, _ = load(vanilla(name))
    student, _ = convert(vanilla(name), stride)
    pixels = torch.randn(2, 3, 16, 16)
    projector = teacher.model.multi_modal_projector
    seen: list[Tensor] = []
    hook = projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), hook:
        teacher.get_image_features(pixel_values=pixels)
        found = student.get_image_features(pixel_values=pixels).pooler_output
        expected = projector(average_pool(seen[0], stride))
    assert torch.equal(torch.stack(list(found)), expected)


@pytest.mark.parametrize("name", VANILLA)
def test_saving_and_loading_through_auto_classes_gives_the_student_back(
    vanilla: Folder, name: str, tmp_path: Path
) -> None:
    student, processor = convert(vanilla(name), 2)
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again: Any = AutoModelForImageTextToText.from_pretrained(tmp_path)
    again_processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(student)
    assert type(again_processor) is type(processor)
    assert again.config.vision_pool_stride == 2
    inputs = batch(again_processor)
    for key, value in batch(processor).items():
        assert torch.equal(inputs[key], value)
    assert torch.equal(logits(again, inputs), logits(student, inputs))
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert type(convert(tmp_path, 2)[0]) is type(student)
    with pytest.raises(ValueError, match=r"vision_pool_stride 2, but stride is 3"):
        convert(tmp_path, 3)


@pytest.mark.parametrize("name", ["llava-siglip", "llava_next-clip"])
def test_generation_with_a_cache_equals_a_greedy_loop_without(vanilla: Folder, name: str) -> None:
    student, processor = convert(vanilla(name), 3)
    for inputs in (batch(processor), text_only(processor)):
        found = student.generate(
            **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=True
        )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        others = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
        for _ in range(5):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            step = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **others}
            scores = logits(student, step)[:, -1]
            scores[:, student.generation_config.eos_token_id] = -torch.inf
            ids = torch.cat([ids, scores.argmax(1, keepdim=True)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        assert torch.equal(found, ids)


@pytest.mark.parametrize("name", ["llava-clip", "llava_next-siglip"])
def test_final_hidden_enters_the_head(vanilla: Folder, name: str) -> None:
    student, processor = convert(vanilla(name), 2)
    for inputs in (batch(processor), text_only(processor)):
        with torch.no_grad():
            found = output_head(student)(final_hidden(student, inputs))
        assert torch.equal(found, logits(student, inputs))


@pytest.mark.parametrize("name", ["llava-clip", "llava_next-siglip"])
def test_final_hidden_is_the_last_of_all_states_and_keeps_no_other(
    vanilla: Folder, name: str
) -> None:
    student, processor = convert(vanilla(name), 2)
    inputs = batch(processor)
    student.train()
    student.activation_checkpointing_enable({"use_reentrant": False})
    outputs: list[Any] = []
    handle = student.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = final_hidden(student, inputs)
        wanted = student(**inputs, output_hidden_states=True).hidden_states
    handle.remove()
    assert torch.equal(found, wanted[-1])
    assert found.dtype == wanted[-1].dtype
    kept = [state for state in outputs[0].hidden_states if state is not None]
    assert len(kept) == 1 < len(wanted)


def test_gradients_through_a_distributed_wrapper_equal_those_without(
    vanilla: Folder, tmp_path: Path
) -> None:
    student, processor = convert(vanilla("llava_next-siglip"), 2)
    set_trainable(student, ("projector", "language_model"))
    inputs = batch(processor)

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        student.zero_grad(set_to_none=True)
        output_head(model)(final_hidden(model, inputs)).square().mean().backward()
        named = student.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    alone = gradients(student)
    init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = gradients(DistributedDataParallel(student, find_unused_parameters=True))
    finally:
        destroy_process_group()
    assert alone.keys() == wrapped.keys()
    assert all(torch.equal(alone[name], wrapped[name]) for name in alone)
    for name in ("model.multi_modal_projector.linear_1.weight", "model.image_newline"):
        assert alone[name].abs().sum() > 0


@pytest.mark.parametrize("name", ["llava-siglip", "llava_next-siglip"])
@pytest.mark.parametrize(
    "parts", [("projector",), ("language_model", "projector"), ("vision_tower",)]
)
def test_only_the_named_parts_are_trained(
    vanilla: Folder, name: str, parts: tuple[TrainPart, ...]
) -> None:
    student, _ = convert(vanilla(name), 2)
    set_trainable(student, ("vision_tower", "projector", "language_model"))
    counts = set_trainable(student, parts)
    trained = {n: p.numel() for n, p in student.named_parameters() if p.requires_grad}
    assert {part for part, count in counts.items() if count} == set(parts)
    assert sum(counts.values()) == sum(trained.values())
    newline_is_trained = name.startswith("llava_next") and "projector" in parts
    assert ("model.image_newline" in trained) == newline_is_trained
    head_is_trained = student.get_output_embeddings().weight.requires_grad
    assert head_is_trained == ("language_model" in parts)


def test_training_nothing_is_refused(vanilla: Folder) -> None:
    student, _ = convert(vanilla("llava-siglip"), 2)
    with pytest.raises(ValueError, match=r"nothing to train.*vision_tower, projector, language_m"):
        set_trainable(student, ())


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    FAMILIES["idefics3"](tmp_path)
    with pytest.raises(ValueError, match=r"model type 'idefics3'.*made from llava, llava_next"):
        convert(tmp_path, 2)


def test_a_stride_larger_than_the_grid_is_refused(vanilla: Folder) -> None:
    with pytest.raises(ValueError, match=r"vision_pool_stride is 5 on a grid of 4 x 4"):
        convert(vanilla("llava-siglip"), 5)


@pytest.mark.parametrize(("vision", "strategy"), [("clip", "full"), ("siglip", "default")])
def test_a_selection_that_breaks_the_grid_is_refused(
    tmp_path: Path, vision: str, strategy: str
) -> None:
    tiny_llava(tmp_path, vision)
    edit(tmp_path, "config.json", vision_feature_select_strategy=strategy)
    with pytest.raises(ValueError, match=rf"vision_feature_select_strategy '{strategy}', expected"):
        convert(tmp_path, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_additional_image_tokens": 2}, "placeholders of a blank image: processor 6, model 4"),
        ({"vision_feature_select_strategy": "default"}, "processor 3, model 4"),
    ],
)
def test_a_processor_that_counts_otherwise_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    tiny_llava(tmp_path)
    edit(tmp_path, "processor_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, 2)


def test_a_checkpoint_without_all_weights_is_refused(tmp_path: Path) -> None:
    tiny_llava(tmp_path)
    edit_text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    edit(
        tmp_path,
        "config.json",
        text_config=edit_text | {"num_hidden_layers": 3, "layer_types": None},
    )
    with pytest.raises(ValueError, match=r"weights of .* are not in the checkpoint, such as"):
        convert(tmp_path, 2)
