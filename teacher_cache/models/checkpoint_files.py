"""Checks the files of a model's folder before anything is loaded from them.

Reads the JSON files whole and of weights only the headers. A ValueError names the file that is cut
or missing, or that is no checkpoint of transformers, and what to do. A hub id passes: its files are
checked when they are downloaded.
"""

import json
from pathlib import Path
from typing import Any

_JSON_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHT_FILES = ("model.safetensors", *_INDEX_FILES, "pytorch_model.bin")
_ADAPTER = "adapter_config.json"
_LFS_POINTER = b"version https://git-lfs"


def require_settings_files(path: str) -> None:
    """Refuse a file, an adapter, a GGUF folder, and JSON files that hold no JSON object."""
    folder = Path(path)
    if folder.is_file():
        raise ValueError(
            f"{path} is a file, expected a folder with config.json, weights and processor files; "
            "give that folder" + (" (GGUF files cannot be loaded)" if ".gguf" in path else "")
        )
    if not folder.is_dir():
        return
    if (folder / _ADAPTER).exists():
        base = _json_object(folder / _ADAPTER).get("base_model_name_or_path")
        raise ValueError(
            f"{folder / _ADAPTER}: the folder holds an adapter (PEFT) of {base}, expected whole "
            "weights; merge it (merge_and_unload, then save_pretrained), or remove this file"
        )
    if (gguf := sorted(folder.glob("*.gguf"))) and not _weight_files(folder):
        raise ValueError(
            f"{gguf[0]}: GGUF files cannot be loaded; give the folder of the original checkpoint "
            "(safetensors)"
        )
    for name in _JSON_FILES:
        if (folder / name).is_file():
            _json_object(folder / name)


def require_weights_files(path: str) -> None:
    """Refuse a local checkpoint without weights, a missing shard, and cut safetensors files."""
    folder = Path(path)
    if not folder.is_dir():
        return
    found = _weight_files(folder)
    if not found:
        raise ValueError(
            f"{path}: holds no weights, expected {_WEIGHT_FILES[0]} or {_WEIGHT_FILES[1]}; "
            "download or save it again"
        )
    shards = [found[0]]
    if found[0].name in _INDEX_FILES:
        shards = _listed(found[0])
    for shard in shards:
        if shard.suffix == ".safetensors":
            _require_whole(shard)


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load weights from, the one that it takes first."""
    return [folder / name for name in _WEIGHT_FILES if (folder / name).is_file()]


def _listed(index: Path) -> list[Path]:
    names = _json_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(
            f"{index}: expected weight_map, from weights to file names; download or save it again"
        )
    shards = [index.parent / name for name in sorted(set(names.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ValueError(
            f"{index}: {len(missing)} of the {len(shards)} files that it lists are missing, such "
            f"as {missing[0]}; download them"
        )
    return shards


def _require_whole(file: Path) -> None:
    """Compare the length of a safetensors file with the one that its header describes."""
    num_bytes = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(8)
        length = int.from_bytes(head, "little")
        if head == _LFS_POINTER[:8]:
            raise ValueError(f"{file}: is a pointer of Git LFS, not weights; run git lfs pull")
        try:
            if len(head) < 8 or length > num_bytes - 8:
                raise ValueError("its header is not whole")
            header: dict[str, Any] = json.loads(opened.read(length))
            ends = [each["data_offsets"][1] for n, each in header.items() if n != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{file}: {num_bytes} bytes that are no safetensors file ({error}); download or "
                "save it again"
            ) from error
    expected = 8 + length + max(ends, default=0)
    if num_bytes != expected:
        raise ValueError(
            f"{file}: has {num_bytes} bytes, its header describes {expected}; download or save it "
            "again"
        )


def _json_object(file: Path) -> dict[str, Any]:
    try:
        data = file.read_bytes()
        found: Any = json.loads(data)
    except OSError as error:
        raise ValueError(
            f"{file}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}; download or save it again") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{file}: expected a JSON object, found {type(found).__name__}; download or save it "
            "again"
        )
    return found
