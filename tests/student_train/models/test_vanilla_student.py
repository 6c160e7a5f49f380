"""A vanilla model as the student: every family, unchanged, and at home in plain transformers."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from student_train.compression.compression import compress
from student_train.config.compression import CompressionSettings
from student_train.config.objective import preset
from student_train.config.recipe import TrainPart
from student_train.models.forward import final_hidden
from student_train.training.trainable import PART_PREFIXES, set_trainable
from teacher_cache.models.checkpoint import load_model
from tests.support.deep import batch_of, encode
from tests.support.epic import fixed, save_deep, train_vanilla
from tests.support.lazy import load_student, student_from_vanilla, vanilla_student
from tests.support.paths import TinyFolder
from tests.support.runs import SETTINGS, tiny_cache
from tests.support.tiny import FAMILIES

PLAIN = """
import sys
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.import_utils import is_torchvision_available
for folder in sys.argv[1:]:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    takes_videos = "video_processor" in open(f"{folder}/processor_config.json").read()
    if is_torchvision_available() or not takes_videos:
        AutoProcessor.from_pretrained(folder)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    ids = torch.arange(3, 12)[None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.save({type(model).__name__: logits.detach()}, f"{folder}/logits.pt")
assert not {"student_train", "teacher_cache"} & set(sys.modules)
"""


class Trained(NamedTuple):
    before: Path
    after: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Of each family, a vanilla model and what two steps of EPIC made of it."""
    runs: dict[str, Trained] = {}
    settings = replace(
        SETTINGS,
        objective=preset("epic-tcd"),
        progression=fixed("dart"),
        train_parts=tuple(PART_PREFIXES),
        max_steps=2,
    )
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        vanilla = save_deep(folder, family)
        reader = tiny_cache(folder / "cache", vanilla, num_samples=5)
        train_vanilla(folder / "run", reader, vanilla, settings)
        runs[family] = Trained(vanilla, folder / "run" / "final")
    return runs


def names_of(family: str, folder: Path) -> dict[TrainPart, set[str]]:
    """First words of the parameters of each part."""
    model, _ = vanilla_student(str(folder))
    found: dict[TrainPart, set[str]] = {}
    for part in PART_PREFIXES:
        counts = set_trainable(model, (part,))
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        num_trained = sum(weight.numel() for weight in trained.values())
        assert counts == dict.fromkeys(PART_PREFIXES, 0) | {part: num_trained}
        found[part] = {".".join(name.split(".")[1:3]) for name in trained}
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_three_parts(family: str, tiny_folder: TinyFolder) -> None:
    found = names_of(family, tiny_folder(family))
    assert all(found[part] for part in PART_PREFIXES)
    decoder = {"embed_tokens", "layers", "norm"}
    assert {name.split(".")[-1] for name in found["language_model"]} - {"weight"} == decoder
    expected = {
        "llava": {"multi_modal_projector.linear_1", "multi_modal_projector.linear_2"},
        "qwen2_5_vl": {"visual.merger"},
        "idefics3": {"connector.modality_projection"},
    }
    assert found["projector"] >= expected.get(family, set())
    if family in expected:
        assert found["projector"] == expected[family]


def test_what_was_trained_loads_in_plain_transformers(trained: dict[str, Trained]) -> None:
    """In a process that imports nothing of this project: same class, all weights, same logits.

    The library loads a processor that takes videos where torchvision is (test_families.py).
    """
    folders = [str(run.after) for run in trained.values()]
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN, *folders],
        cwd=trained["llava"].before,
        capture_output=True,
        text=True,
        check=False,
    )
    assert plain.returncode == 0, plain.stderr
    for run in trained.values():
        (found,) = torch.load(run.after / "logits.pt").items()
        before, _ = load_model(str(run.before), torch.float32)
        after, _ = load_student(str(run.after))
        assert found[0] == type(before).__name__ == type(after).__name__
        old, new = before.state_dict(), after.state_dict()
        assert {n: v.shape for n, v in old.items()} == {n: v.shape for n, v in new.items()}
        assert any(not torch.equal(old[name], new[name]) for name in old)
        model: Any = after
        ids = torch.arange(3, 12)[None]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(found[1], logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_compresses_at_any_ratio(family: str, trained: dict[str, Trained]) -> None:
    """Also at layers and by compressors that it was not trained for."""
    model, processor = load_student(str(trained[family].after))
    batch = batch_of(encode(model, processor))
    lengths: list[int] = []
    for ratio in (0.0, 0.3, 0.9):
        settings = CompressionSettings.at_layer(1, ratio, "random")
        with compress(model, settings, batch), torch.no_grad():
            lengths.append(final_hidden(model, batch.inputs).shape[1])
    assert lengths == sorted(set(lengths), reverse=True)


def test_a_pooling_student_is_no_vanilla_model(llava: Path, tmp_path: Path) -> None:
    model, processor = student_from_vanilla(str(llava), stride=2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a student that pools its vision tokens"):
        vanilla_student(str(tmp_path))


def test_a_model_with_parameters_of_no_part_is_refused(llava: Path) -> None:
    model, _ = vanilla_student(str(llava))
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"parameter extra of .* belongs to none of the parts"):
        set_trainable(model, ("projector",))
