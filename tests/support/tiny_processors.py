"""Writes tokenizers and processor files for the tiny models, laid out as published checkpoints are.

The files are written as text, so that a processor with videos needs no torchvision to be written.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_CORPUS = (
    "what is in the picture? a red square and a blue circle. user assistant system "
    "how many digits do you see? there are three of them: one, two, four. describe both images"
)


@cache
def _bpe(special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    return tokenizer.to_str()


def tokenizer(extra: dict[str, str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with named extra special tokens (name -> text)."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe(tuple(extra.values()))),
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens=extra,
    )


def token_id(words: PreTrainedTokenizerFast, text: str) -> int:
    """Id of one special token."""
    found = words.convert_tokens_to_ids(text)
    assert isinstance(found, int)
    return found


_RGB: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}


def publish(
    folder: Path,
    words: PreTrainedTokenizerFast,
    name: str,
    template: str,
    images: dict[str, Any],
    *,
    processor: dict[str, Any] | None = None,
    videos: dict[str, Any] | None = None,
    jinja: bool = False,
) -> None:
    """Write the files of a processor of class `name`.

    `images` is preprocessor_config.json; `processor` processor_config.json and `videos`
    video_preprocessor_config.json, where the family's checkpoints have one. The template is
    chat_template.json, or with `jinja` chat_template.jinja.
    """
    words.save_pretrained(folder)
    of_class = {"processor_class": name}
    _update(folder / "tokenizer_config.json", of_class)
    _update(folder / "preprocessor_config.json", {**_RGB, **images, **of_class})
    if processor is not None:
        _update(folder / "processor_config.json", {**processor, **of_class})
    if videos is not None:
        _update(folder / "video_preprocessor_config.json", {**videos, **of_class})
    if jinja:
        (folder / "chat_template.jinja").write_text(template)
    else:
        _update(folder / "chat_template.json", {"chat_template": template})


def _update(file: Path, entries: dict[str, Any]) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | entries, indent=2) + "\n")
