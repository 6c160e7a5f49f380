"""Nothing is cut or changed, whatever a checkpoint's files say of truncation and padding."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers, processors

from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.models.processors import load_processor
from teacher_cache.schema.samples import Sample
from tests.conftest import TinyFolder
from tests.support.lazy import AutoConfig
from tests.support.tiny import ask, tiny_samples

LONG = "a red square and a blue circle. " * 10
CUT = {"direction": "Right", "max_length": 40, "strategy": "LongestFirst", "stride": 0}
PAD: dict[str, Any] = {
    "strategy": {"Fixed": 900},
    "direction": "Left",
    "pad_to_multiple_of": 64,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}
Spoil = Callable[[Path], None]


def _in_json(name: str, **entries: Any) -> Spoil:
    def write(folder: Path) -> None:
        path = folder / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | entries))

    return write


def _encoder(folder: Path) -> SampleEncoder:
    return SampleEncoder(load_processor(str(folder)), AutoConfig.from_pretrained(folder))


def _both(model: SampleEncoder, sample: Sample) -> tuple[list[int], list[int]]:
    """All tokens of a sample, and those of its prompt, without further outputs."""
    encoded, prompt = model.encode(sample), model.encode_prompt(sample)
    assert not encoded.inputs.keys() & {"length", "special_tokens_mask"}
    return encoded.inputs["input_ids"].tolist(), prompt.inputs["input_ids"].tolist()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "idefics3"])
@pytest.mark.parametrize(
    "spoil",
    [
        _in_json("tokenizer.json", truncation=CUT),
        _in_json("tokenizer.json", padding=PAD),
        _in_json("tokenizer.json", truncation=CUT, padding=PAD),
        _in_json("tokenizer_config.json", truncation=True, max_length=40, padding="max_length"),
        _in_json("tokenizer_config.json", model_max_length=40),
        _in_json("tokenizer_config.json", model_max_length=40, truncation=True, padding=True),
        _in_json("tokenizer_config.json", pad_to_multiple_of=64, padding_side="left", padding=True),
        _in_json(
            "tokenizer_config.json",
            padding="max_length",
            model_max_length=900,
            padding_side="left",
        ),
        _in_json("tokenizer_config.json", return_special_tokens_mask=True),
        _in_json("tokenizer_config.json", split_special_tokens=True),
        _in_json("tokenizer_config.json", is_split_into_words=True, return_length=True),
        _in_json("tokenizer_config.json", model_input_names=["input_ids"]),
        _in_json("processor_config.json", text_kwargs={"truncation": True, "max_length": 40}),
    ],
)
def test_the_files_of_a_checkpoint_cut_and_pad_nothing(
    family: str, spoil: Spoil, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(family), folder)
    samples = [ask("<image>\nwhat is in the picture? " + LONG, LONG), tiny_samples(3)[2]]
    wanted = [_both(_encoder(tiny_folder(family)), sample) for sample in samples]
    spoil(folder)
    model = _encoder(folder)
    backend = model.processor.tokenizer.backend_tokenizer
    assert backend.truncation is backend.padding is None
    assert [_both(model, sample) for sample in samples] == wanted
    said = model.encode(samples[0]).spans
    text = model.processor.tokenizer.decode(said.content_ids[said.is_response])
    assert text == f"{LONG}<|im_end|>"


def test_tokens_that_a_tokenizer_adds_behind_a_text_are_left_out(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llava"), folder)
    sample = tiny_samples(2)[1]
    whole, prompt = _both(_encoder(folder), sample)
    path = folder / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    ends = [(token, backend.token_to_id(token)) for token in ("<|im_start|>", "<|im_end|>")]
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=ends
    )
    backend.save(str(path))
    found_whole, found_prompt = _both(_encoder(folder), sample)
    assert found_whole == [ends[0][1], *whole]
    assert found_prompt == [ends[0][1], *prompt]


def test_letters_that_a_tokenizer_composes_are_all_labels(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llava"), folder)
    path = folder / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.normalizer = normalizers.NFC()
    backend.save(str(path))
    model = _encoder(folder)
    spans = model.encode(ask("e\u0301te\u0301?", "cafe\u0301 \u0301x", seeds=())).spans
    text = model.processor.tokenizer.decode(spans.content_ids)
    assert text == "\u00e9t\u00e9?caf\u00e9 \u0301x<|im_end|>"
