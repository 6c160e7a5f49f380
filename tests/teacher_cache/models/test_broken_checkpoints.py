"""A folder that cannot be loaded ends in one ValueError that names file and remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from teacher_cache.models.checkpoint import load_config, load_model
from tests.conftest import TinyFolder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Damage = Callable[[Path], object]


def _edit(name: str, **changes: Any) -> Damage:
    """Set entries of a JSON file; None removes one."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / name).read_text()) | changes
        kept = {key: value for key, value in found.items() if value is not None}
        (folder / name).write_text(json.dumps(kept))

    return damage


def _write(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def _cut(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return damage


def _change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    return damage


def _reshape(weights: dict[str, torch.Tensor]) -> None:
    name = next(name for name in weights if name.endswith("layers.0.self_attn.q_proj.bias"))
    weights[name] = torch.zeros(3)


def _split(folder: Path) -> None:
    """Two shards and their index, one shard of which is missing."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(weights)
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file({name: weights[name] for name in names[:9]}, folder / shards[0], {"format": "pt"})
    files = {name: shards[number >= 9] for number, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _only(name: str, data: bytes) -> Damage:
    """The folder holds this file and no weights."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(data)

    return damage


ADAPTER = json.dumps({"base_model_name_or_path": "some/base", "peft_type": "LORA"}).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
STRANGER = {"model.language_model.layers.77.mlp.weight": torch.zeros(3, 3)}
CASES: dict[str, tuple[Damage, str]] = {
    "no patch size": (
        _edit("processor_config.json", patch_size=None),
        r'processor_config.json has patch_size None, expected 4; add "patch_size": 4',
    ),
    "patch size as text": (_edit("processor_config.json", patch_size="4"), "patch_size '4'"),
    "config is no JSON": (_write("config.json", b"{no"), r"/config.json: not valid JSON.*again"),
    "config is a list": (_write("config.json", b"[]"), r"/config.json: expected a JSON object"),
    "config without a type": (_write("config.json", b"{}"), r"see its config.json"),
    "config of a text model": (_edit("config.json", model_type="llama"), "'llama' are not supp"),
    "config of an unknown type": (_edit("config.json", model_type="foo"), "'foo' are not supp"),
    "config with a wrong value": (_edit("config.json", text_config=7), r"see its config.json"),
    "unknown dtype": (_edit("config.json", dtype="float99"), "names the dtype 'float99'"),
    "dtype as a number": (_edit("config.json", dtype=7), "names the dtype 7, expected one such"),
    "quantised without its package": (
        _edit("config.json", quantization_config={"quant_method": "awq", "bits": 4}),
        "a package is missing.*gptqmodel",
    ),
    "processor is a list": (_write("processor_config.json", b"[]"), "processor_config.json: exp"),
    "processor is deep": (_write("processor_config.json", b"[" * 10**6), "processor_config.json"),
    "tokenizer is cut": (_cut("tokenizer.json", 0.5), r"/tokenizer.json: not valid JSON"),
    "tokenizer says nothing": (_write("tokenizer.json", b"{}"), "its processor and tokenizer fil"),
    "generation settings are a list": (_write("generation_config.json", b"[]"), "generation_con"),
    "weights are cut": (_cut(WEIGHTS, 0.5), rf"/{WEIGHTS}: has \d+ bytes, its header describes"),
    "weights lack their end": (_cut(WEIGHTS, 0.9999), rf"/{WEIGHTS}: has .* save it again"),
    "weights are empty": (_write(WEIGHTS, b""), rf"/{WEIGHTS}: 0 bytes that are no safetensors"),
    "weights are noise": (_write(WEIGHTS, b"\0" * 99), rf"/{WEIGHTS}: 99 bytes that are no"),
    "weights are a pointer": (_write(WEIGHTS, POINTER), "run git lfs pull"),
    "weights of another shape": (
        _change_weights(_reshape),
        r"1 weights have another shape .*q_proj.bias is \(3,\), expected \(32,\)",
    ),
    "weights of another model": (
        _change_weights(lambda weights: weights.update(STRANGER)),
        r"1 weights of the checkpoint have no place in .*layers.77.mlp.weight",
    ),
    "a shard is missing": (_split, rf"/{INDEX}: 1 of the 2 files .* model-00002-of-00002"),
    "an index of nothing": (_only(INDEX, b"{}"), rf"/{INDEX}: expected weight_map"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "holds no weights, expected model"),
    "a pickle of garbage": (_only("pytorch_model.bin", b"garbage"), r"A .bin file .* damaged"),
    "an empty pickle": (_only("pytorch_model.bin", b""), r"A .bin file of it is damaged"),
    "a pickle that runs code": (
        _only("pytorch_model.bin", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."),
        "holds more than tensors, which is never run",
    ),
    "an adapter": (_only("adapter_config.json", ADAPTER), r"adapter \(PEFT\) of some/base.*merge"),
    "an adapter beside weights": (_write("adapter_config.json", ADAPTER), r"adapter \(PEFT\)"),
    "a GGUF file": (_only("model-Q4.gguf", b"GGUF"), "GGUF files cannot be loaded; give the fol"),
}


@pytest.mark.parametrize("case", CASES)
def test_file_and_remedy_are_named(case: str, tmp_path: Path, tiny_folder: TinyFolder) -> None:
    damage, said = CASES[case]
    folder = Path(shutil.copytree(tiny_folder("llava"), tmp_path / "teacher"))
    damage(folder)
    with pytest.raises(ValueError, match=f"(?s){said}") as error:
        load_model(str(folder))
    assert str(folder) in str(error.value) or "not supported" in said or "not supp" in said


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"is a file, expected a folder .*GGUF"):
        load_config(str(file))


def test_a_hub_id_without_network_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"nobody/nothing cannot be loaded: .* on the hub"):
        load_config("nobody/nothing")


def test_known_buffers_of_older_checkpoints_are_no_strangers(
    tmp_path: Path, tiny_folder: TinyFolder
) -> None:
    folder = Path(shutil.copytree(tiny_folder("llava"), tmp_path / "teacher"))
    buffer = {"model.vision_tower.vision_model.embeddings.position_ids": torch.zeros(3)}
    _change_weights(lambda weights: weights.update(buffer))(folder)
    load_model(str(folder))
