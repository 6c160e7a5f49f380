"""Digests: equal after saving and loading, different after any change that counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from teacher_cache.models.digests import (
    chat_template_digest,
    config_digest,
    image_processor_digest,
    tokenizer_digest,
    weights_digest,
)
from teacher_cache.models.processors import load_processor
from tests.conftest import TinyFolder
from tests.support.lazy import AutoModelForImageTextToText
from tests.support.tiny import tiny_llava

Loaded = tuple[Any, Any]


def _load(folder: Path) -> Loaded:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return model, load_processor(str(folder))


def _digests(loaded: Loaded) -> dict[str, str]:
    model, processor = loaded
    return {
        "weights": weights_digest(model),
        "config": config_digest(model.config),
        "tokenizer": tokenizer_digest(processor.tokenizer),
        "chat_template": chat_template_digest(processor),
        "image_processor": image_processor_digest(processor),
    }


@pytest.fixture
def loaded(tiny_folder: TinyFolder) -> Loaded:
    return _load(tiny_folder("llava"))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_saving_and_loading_changes_no_digest(
    family: str, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    model, processor = _load(tiny_folder(family))
    model.save_pretrained(tmp_path / "elsewhere", max_shard_size="20KB")
    processor.save_pretrained(tmp_path / "elsewhere")
    assert len(list((tmp_path / "elsewhere").glob("*.safetensors"))) > 1
    assert _digests(_load(tmp_path / "elsewhere")) == _digests((model, processor))


def test_equal_models_built_twice_have_equal_digests(tmp_path: Path, loaded: Loaded) -> None:
    assert _digests(_load(tiny_llava(tmp_path / "again"))) == _digests(loaded)
    other = _digests(_load(tiny_llava(tmp_path / "other", seed=1)))
    assert {name for name, digest in _digests(loaded).items() if other[name] != digest} == {
        "weights"
    }


def _one_weight(loaded: Loaded) -> None:
    with torch.no_grad():
        loaded[0].model.language_model.norm.weight[3] += 1e-6


def _one_setting(loaded: Loaded) -> None:
    loaded[0].config.text_config.rms_norm_eps *= 2


def _one_token(loaded: Loaded) -> None:
    loaded[1].tokenizer.add_tokens(["giraffe"])


def _one_letter(loaded: Loaded) -> None:
    loaded[1].chat_template += " "


def _one_mean(loaded: Loaded) -> None:
    loaded[1].image_processor.image_mean = [0.5, 0.5, 0.25]


def _another_backend(loaded: Loaded) -> None:
    own = type(loaded[1].image_processor)
    loaded[1].image_processor.__class__ = type("SiglipImageProcessorOther", (own,), {})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_one_weight, "weights"),
        (_one_setting, "config"),
        (_one_token, "tokenizer"),
        (_one_letter, "chat_template"),
        (_one_mean, "image_processor"),
        (_another_backend, "image_processor"),
    ],
)
def test_any_change_changes_its_digest_and_no_other(
    change: Callable[[Loaded], None], name: str, loaded: Loaded
) -> None:
    before = _digests(loaded)
    change(loaded)
    after = _digests(loaded)
    assert {key for key in before if before[key] != after[key]} == {name}


def test_where_a_model_came_from_does_not_count(loaded: Loaded) -> None:
    before = _digests(loaded)
    config = loaded[0].config
    config._name_or_path, config.transformers_version = "elsewhere", "0.0"
    config.architectures = ["Another"]
    loaded[1].tokenizer.backend_tokenizer.enable_truncation(5)
    loaded[1].tokenizer.backend_tokenizer.enable_padding()
    assert _digests(loaded) == before
