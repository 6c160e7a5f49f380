"""What cannot work is refused in the order of its cost: config, processor, weights, source."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.build.build import build
from pipeline.config.build import BuildConfig, SourceConfig
from pipeline.config.plan import PlanConfig
from pipeline.config.stages import EvaluateConfig
from pipeline.fidelity.pilot import run_pilot
from pipeline.inspection.verify_teacher import require_processor
from teacher_cache.schema.options import RecordSettings
from tests.conftest import TinyFolder
from tests.support.lazy import evaluate, student_from_vanilla, vanilla_student
from tests.support.llava_json import write_llava_json
from tests.support.tiny import tiny_samples

Stage = Callable[[Path, Path, Path], object]


def _build(model: Path, source: Path, out: Path) -> object:
    settings = RecordSettings(records="topk", top_k=8)
    where = SourceConfig(path=str(source))
    config = BuildConfig(source=where, teacher=str(model), out=str(out), settings=settings)
    return build(config)


def _evaluate(model: Path, source: Path, out: Path) -> object:
    where = SourceConfig(path=str(source))
    return evaluate(EvaluateConfig(model=str(model), source=where, out=out))


def _pilot(model: Path, source: Path, _: Path) -> object:
    return run_pilot(PlanConfig(pilot=2, source=str(source), teacher=str(model)))


READ_SAMPLES: tuple[Stage, ...] = (_build, _evaluate, _pilot)
LOAD_ONLY: tuple[Stage, ...] = (
    lambda model, _, __: vanilla_student(str(model)),
    lambda model, _, __: student_from_vanilla(str(model)),
    lambda model, _, __: require_processor(str(model)),
)


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("weights were opened, or the source was scanned")


@pytest.fixture
def model(tmp_path: Path, tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose weights must not be touched, by stages that must not scan."""
    from transformers import AutoModelForImageTextToText

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", _never)
    monkeypatch.setattr("pipeline.build.build.scan", _never)
    monkeypatch.setattr("pipeline.student.evaluate.scan", _never)
    return Path(shutil.copytree(tiny_folder("llava"), tmp_path / "model"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_llava_json(tmp_path, tiny_samples(3))


@pytest.mark.parametrize("stage", READ_SAMPLES + LOAD_ONLY)
def test_an_unsupported_type_is_refused_by_its_config_alone(
    stage: Stage, model: Path, source: Path, tmp_path: Path
) -> None:
    for file in model.iterdir():
        file.unlink()
    (model / "config.json").write_text('{"model_type": "mllama"}')
    with pytest.raises(ValueError, match=r"type 'mllama' are not supported.*--plugin"):
        stage(model, source, tmp_path / "out")


@pytest.mark.parametrize("stage", READ_SAMPLES + LOAD_ONLY)
def test_a_missing_processor_is_refused_before_weights(
    stage: Stage, model: Path, source: Path, tmp_path: Path
) -> None:
    for file in model.iterdir():
        if file.name != "config.json":
            file.unlink()
    with pytest.raises(ValueError, match="see its processor and tokenizer files"):
        stage(model, source, tmp_path / "out")


@pytest.mark.parametrize("stage", READ_SAMPLES)
def test_a_template_that_fails_on_the_samples_is_refused_before_weights(
    stage: Stage, model: Path, source: Path, tmp_path: Path
) -> None:
    template = model / "chat_template.jinja"
    picky = (
        "{% if messages[0].content[0].text is undefined %}{{ raise_exception('no') }}{% endif %}"
    )
    template.write_text(picky + template.read_text())
    source = write_llava_json(tmp_path, tiny_samples(2))  # both begin with an image
    with pytest.raises(ValueError, match=r"can encode none of the 2 samples .*the first: sample"):
        stage(model, source, tmp_path / "out")


@pytest.mark.parametrize("stage", READ_SAMPLES)
def test_missing_weights_are_refused_before_the_scan(
    stage: Stage, model: Path, source: Path, tmp_path: Path
) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no weights, expected model.safetensors"):
        stage(model, source, tmp_path / "out")
