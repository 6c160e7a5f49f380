"""What cannot be loaded whole is refused with the path and a remedy, whoever asks for it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from teacher_cache.models.checkpoint import load_config, load_model, resolve_device
from teacher_cache.teacher.teacher import Teacher
from tests.conftest import TinyFolder
from tests.support.lazy import load_student, student_from_vanilla

LOADERS: tuple[Callable[[str], object], ...] = (Teacher.load, load_student, student_from_vanilla)
every_loader = pytest.mark.parametrize("load", LOADERS, ids=["teacher", "student", "vanilla"])


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: TinyFolder) -> Path:
    """A copy of a tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_folder("llava"), tmp_path / "runs" / "teacher"))


@every_loader
def test_a_path_that_is_not_there_is_named_without_asking_the_hub(
    load: Callable[[str], object], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no such folder") as error:
        load(str(tmp_path / "nothing"))
    assert str(tmp_path / "nothing") in str(error.value)
    with pytest.raises(ValueError, match="runs/teacher/final: there is no such folder"):
        load_config("runs/teacher/final")


@every_loader
def test_a_run_folder_is_refused_with_the_way_to_its_model(
    load: Callable[[str], object], folder: Path
) -> None:
    run = folder.parent / "run"
    run.mkdir()
    folder.rename(run / "final")
    (run / "config.json").write_text('{"seed": 0}')
    with pytest.raises(ValueError, match=r"a run's model is in .*run/final"):
        load(str(run))


@every_loader
def test_missing_weights_are_never_random(load: Callable[[str], object], folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    dropped = sorted(name for name in weights if "projector" in name)[0]
    save_file({name: w for name, w in weights.items() if name != dropped}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights of .* are not in the checkpoint"):
        load(str(folder))


@every_loader
def test_a_tokenizer_alone_is_no_processor(load: Callable[[str], object], folder: Path) -> None:
    for file in folder.glob("*processor_config.json"):
        file.unlink()
    with pytest.raises(ValueError, match="processor") as error:
        load(str(folder))
    assert str(folder) in str(error.value)


def test_an_attention_that_is_not_installed_is_bad_input(folder: Path) -> None:
    with pytest.raises(ValueError, match="needs the package flash_attn"):
        load_model(str(folder), attention="flash_attention_2")


def test_a_device_that_is_not_there_is_bad_input() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="expected auto, cpu, cuda"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match="CUDA devices; use device auto or cpu"):
        resolve_device(f"cuda:{torch.cuda.device_count()}")
