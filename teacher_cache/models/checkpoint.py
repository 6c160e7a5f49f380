"""Loads a model and its processor from a folder or the hub.

Refuses a checkpoint with missing weights (transformers would initialise them at random) and a
processor without an image processor. Never runs code from a checkpoint. Every failure is a
ValueError that names the path and, if known, the remedy.
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from teacher_cache.models.processors import load_processor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin


def load_config(path: str) -> "PreTrainedConfig":
    """The config of a local folder or hub id."""
    from transformers import AutoConfig

    with _named(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def load_model(
    path: str, dtype: torch.dtype | None = None, attention: str | None = None
) -> "tuple[PreTrainedModel, ProcessorMixin]":
    """Load an image-text-to-text model with its processor; in eval mode, on the CPU.

    `dtype` defaults to the checkpoint's own, `attention` to the library's choice.
    """
    from transformers import AutoModelForImageTextToText, ProcessorMixin

    with _named(path):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype="auto" if dtype is None else dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, info = loaded
        processor: Any = load_processor(path)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{path}: {len(missing)} weights of {type(model).__name__} are not in the checkpoint, "
            f"such as {missing[0]}; download or save it again"
        )
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{path}: found a {type(processor).__name__} instead of a processor of images and "
            "text; its processor_config.json or preprocessor_config.json is missing, or names a "
            "class that this version of transformers does not know"
        )
    return model, processor


def resolve_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA if available, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, expected auto, cpu, cuda or cuda:<n>") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r}, but torch finds {torch.cuda.device_count()} CUDA devices; use "
            "device auto or cpu"
        )
    return device


@contextmanager
def _named(path: str) -> Generator[None]:
    """Convert transformers' errors for a path into one ValueError that names the path."""
    folder = Path(path)
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) > 2):
        raise ValueError(f"{path}: there is no such folder, and a hub id is <owner>/<name>")
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        if folder.is_dir() and (folder / "final" / "config.json").exists():
            remedy = f"a run's model is in {folder / 'final'}"
        elif folder.is_dir():
            remedy = "expected a folder with a model and its processor"
        else:
            remedy = "there is no such folder here, so it was looked for on the hub"
        raise ValueError(f"{path} cannot be loaded: {remedy}. {error}") from error
