"""Loads a model and its processor from a folder or the hub.

Refuses what is wrong in the order of its cost: config and model type, processor, chat template on a
sample of the caller, then weights. Missing weights are refused (transformers would initialise them
at random), and so are weights that the model has no place for. Never runs code from a checkpoint.
Every failure is a ValueError that names the path and, if known, file and remedy.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from teacher_cache.encoding.view_geometry import require_supported
from teacher_cache.models.checkpoint_files import require_settings_files, require_weights_files
from teacher_cache.models.processors import load_processor
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.samples import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

ProcessorCheck = Callable[[Any, Any], None]
"""Raises ValueError for a processor and a config that cannot serve; weights are loaded after."""

_AGAIN = "download or save it again"


def load_config(path: str) -> "PreTrainedConfig":
    """The config of a local folder or hub id; ValueError for an unsupported model type."""
    from transformers import AutoConfig, PreTrainedConfig

    require_settings_files(path)
    with _named(path, "its config.json"):
        raw, _ = PreTrainedConfig.get_config_dict(path)
    if isinstance(raw.get("model_type"), str):
        require_supported(raw["model_type"])
    _require_dtype(path, raw.get("dtype", raw.get("torch_dtype")))
    with _named(path, "its config.json"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def load_checked_processor(
    path: str, config: Any, check: ProcessorCheck | None = None
) -> "ProcessorMixin":
    """The processor of a folder or hub id, which also passes the caller's check."""
    from transformers import ProcessorMixin

    with _named(path, "its processor and tokenizer files"):
        processor: Any = load_processor(path)
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{path}: found a {type(processor).__name__} instead of a processor of images and "
            "text; its processor_config.json or preprocessor_config.json is missing, or names a "
            "class that this version of transformers does not know"
        )
    _require_patch_size(path, config, processor)
    if check is not None:
        check(processor, config)
    return processor


def load_model(
    path: str,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    check: ProcessorCheck | None = None,
) -> "tuple[PreTrainedModel, ProcessorMixin]":
    """Load an image-text-to-text model with its processor; in eval mode, on the CPU.

    `dtype` defaults to the checkpoint's own, `attention` to the library's choice. No weight is
    opened before config and processor have passed, and `check`, which gets both.
    """
    from transformers import AutoModelForImageTextToText

    config = load_config(path)
    _require_attention(attention)
    processor = load_checked_processor(path, config, check)
    require_weights_files(path)
    with _named(path, "its weights"):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype="auto" if dtype is None else dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below by name
        )
    model, info = loaded
    if wrong := sorted(info["mismatched_keys"]):
        name, found, expected = wrong[0]
        raise ValueError(
            f"{path}: {len(wrong)} weights have another shape than its config.json says: {name} is "
            f"{tuple(found)}, expected {tuple(expected)}; one of both belongs to another checkpoint"
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{path}: {len(missing)} weights of {type(model).__name__} are not in the checkpoint, "
            f"such as {missing[0]}; {_AGAIN}"
        )
    if unused := sorted(info["unexpected_keys"]):
        raise ValueError(
            f"{path}: {len(unused)} weights of the checkpoint have no place in "
            f"{type(model).__name__}, such as {unused[0]}; its config.json belongs to another "
            "checkpoint, or an adapter was not merged"
        )
    return model, processor


def _require_attention(attention: str | None) -> None:
    from transformers.utils.import_utils import is_flash_attn_2_available

    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise ValueError(
            "--attention flash_attention_2 needs the package flash_attn and a GPU; install it, or "
            "take sdpa"
        )


def _require_dtype(path: str, dtype: Any) -> None:
    if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ValueError(
            f"{path}: its config.json names the dtype {dtype!r}, expected one such as float32 or "
            "bfloat16; correct it"
        )


def _require_patch_size(path: str, config: Any, processor: Any) -> None:
    """Refuse a processor that counts vision tokens by a patch size and has none."""
    found = getattr(processor, "patch_size", 1)
    if isinstance(found, int) and found > 0:
        return
    wanted = getattr(getattr(config, "vision_config", None), "patch_size", "the model's")
    raise ValueError(
        f"{path}: its processor_config.json has patch_size {found!r}, expected {wanted}; add "
        f'"patch_size": {wanted}'
    )


def require_one_encodes(
    encode: Callable[[Sample], object], samples: Iterable[Sample], path: str
) -> None:
    """Raise ValueError, with the first cause, if none of the samples can be encoded."""
    failed: list[SampleError] = []
    for sample in samples:
        try:
            encode(sample)
            return
        except SampleError as error:
            failed.append(error)
    if failed:
        raise ValueError(
            f"{path}: its processor can encode none of the {len(failed)} samples that were tried; "
            f"the first: {failed[0]}"
        )


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
def _named(path: str, what: str) -> Generator[None]:
    """Convert any error of transformers about a path into one ValueError that names the path.

    The library raises what its files make it stumble over: KeyError, TypeError, UnpicklingError.
    """
    folder = Path(path)
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) > 2):
        raise ValueError(f"{path}: there is no such folder, and a hub id is <owner>/<name>")
    try:
        yield
    except Exception as error:
        if folder.is_dir() and (folder / "final" / "config.json").exists():
            remedy = f"a run's model is in {folder / 'final'}"
        elif isinstance(error, MemoryError | torch.OutOfMemoryError):
            remedy = "there is not enough memory; use another machine, or --dtype bfloat16"
        elif not folder.is_dir():
            remedy = "there is no such folder here, so it was looked for on the hub"
        elif isinstance(error, ImportError):
            remedy = "a package is missing"
        else:
            remedy = f"expected a folder with a model and its processor; see {what}, or {_AGAIN}"
        reason = _reason(error)
        raise ValueError(f"{path} cannot be loaded: {remedy}. {reason}") from error


def _reason(error: Exception) -> str:
    """What the library says, with the kind of error where the text alone says little."""
    if isinstance(error, UnpicklingError | EOFError):
        return "A .bin file of it is damaged, or holds more than tensors, which is never run"
    if isinstance(error, OSError | ValueError | ImportError):
        return str(error)
    return f"{type(error).__name__}: {error}"
