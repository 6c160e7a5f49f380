"""Every listed family goes through every stage with the library's own processor.

Without torchvision as README installs it; with torchvision in an environment of its own
(`make test-torchvision`). Each run adds its line to the table that pytest prints at its end.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.build.build import build
from pipeline.config.stages import TrainConfig
from pipeline.inspection.cache import describe_cache
from pipeline.inspection.verify_teacher import verify_teacher
from student_train.config.objective import preset
from student_train.config.recipe import TrainerSettings
from teacher_cache.folder.reader import CacheReader
from teacher_cache.models.processors import load_processor
from tests.conftest import TinyFolder
from tests.support.lazy import evaluate, train
from tests.support.llava_json import evaluation, settings_of, small_build
from tests.support.tiny import LISTED, tiny_samples

STAGES = ("build", "verify --teacher", "inspect", "train", "evaluate")
NUM_SAMPLES = 5
every_family = pytest.mark.parametrize("family", sorted(LISTED))
Record = Any
"""pytest's `record_property`."""


def through_every_stage(model: Path, out: Path) -> None:
    cache = out / "cache"
    settings = settings_of("topk")
    build(small_build(out, tiny_samples(NUM_SAMPLES), model, settings, NUM_SAMPLES, format="arrow"))
    reader = CacheReader.open(cache)
    assert verify_teacher(reader, str(model), device="cpu").problems == ()
    described = describe_cache(reader)
    assert described["samples"] == NUM_SAMPLES
    assert described["pictures"]["images"] == 5
    training = TrainerSettings(
        objective=preset("supervised"),
        max_steps=1,
        batch_size=4,
        micro_batch_size=4,
        device="cpu",
        log_steps=1,
    )
    run = out / "run"
    config = TrainConfig(
        cache=str(cache), student=str(model), projector="none", out=run, training=training
    )
    final = train(config)
    metrics = evaluate(evaluation(final, out, "run/eval", num_samples=2, max_new_tokens=2))
    assert metrics["num_samples"] == 2


def stage_line(family: str, processor: Any, where: str) -> str:
    names = f"{type(processor).__name__}, {type(processor.image_processor).__name__}"
    return f"{family:16} {where:20} {', '.join(STAGES)}: works ({names})"


@every_family
def test_a_family_goes_through_every_stage(
    family: str, tiny_folder: TinyFolder, tmp_path: Path, record_property: Record
) -> None:
    model = tiny_folder(family)
    through_every_stage(model, tmp_path)
    processor = load_processor(str(model))
    assert type(processor).__module__.startswith("transformers.")
    assert type(processor.image_processor).__name__.endswith("Pil")
    record_property("tried", stage_line(family, processor, "without torchvision"))


@pytest.mark.torchvision
@every_family
def test_a_family_goes_through_every_stage_with_torchvision(
    family: str, tiny_folder: TinyFolder, tmp_path: Path, record_property: Record
) -> None:
    model = tiny_folder(family)
    through_every_stage(model, tmp_path)
    processor = load_processor(str(model))
    assert not type(processor.image_processor).__name__.endswith("Pil")
    record_property("tried", stage_line(family, processor, "with torchvision"))


@pytest.mark.torchvision
@every_family
def test_a_folder_that_was_saved_without_torchvision_has_videos_with_it(
    family: str, tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_processor(str(tiny_folder(family)))
    with monkeypatch.context() as patch:
        patch.setattr("transformers.utils.import_utils.is_torchvision_available", lambda: False)
        load_processor(str(tiny_folder(family))).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_folder(family) / "config.json").read_bytes())
    again = load_processor(str(tmp_path))
    assert type(again) is type(whole)
    for part in ("image_processor", "video_processor"):
        mine: Any = getattr(again, part, None)
        wanted: Any = getattr(whole, part, None)
        assert type(mine) is type(wanted)
        assert mine is None or mine.size == wanted.size


@pytest.mark.torchvision
@every_family
def test_both_backends_agree_but_for_rounding_of_the_resize(
    family: str, tiny_folder: TinyFolder, record_property: Record
) -> None:
    folder = tiny_folder(family)
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)).resize((90, 70))
    found: list[Any] = []
    for backend in ("pil", "torchvision"):
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(folder, backend=backend)
        found.append(processor(images=[smooth], return_tensors="pt"))
    scale = 255 * processor.image_std[0]
    mine, wanted = (each["pixel_values"].float() for each in found)
    assert mine.shape == wanted.shape
    apart = (mine - wanted).abs() * scale
    assert apart.max() <= 4
    assert apart.mean() <= 0.5
    line = f"greatest {apart.max():.2f}, mean {apart.mean():.3f} of 255 levels"
    record_property("tried", f"{family:16} PIL and torchvision apart by: {line}")
