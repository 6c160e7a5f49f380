"""Digests of what a teacher is: weights, config, tokenizer, chat template, image processor.

Promise: equal content gives an equal digest, wherever it was loaded from and however often it was
saved; any change that can change a number or a token changes the digest.
Names of files and folders, versions of libraries and shards of checkpoints do not count.
"""

import json
from typing import Any

from teacher_cache.schema.fingerprint import digest_json, digest_tensors

_CONFIG_BOOKKEEPING = frozenset(
    {"_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype"}
)
"""Config entries that say where a model came from or how it is held, not what it computes."""

_IMAGE_PROCESSOR_BOOKKEEPING = frozenset({"image_processor_type", "processor_class"})


def weights_digest(model: Any) -> str:
    """Digest of the state dict of a torch model: names, dtypes, shapes and bytes."""
    return digest_tensors(model.state_dict().items())


def config_digest(config: Any) -> str:
    """Digest of a transformers config, nested configs included, without bookkeeping."""
    return digest_json(_without(json.loads(config.to_json_string()), _CONFIG_BOOKKEEPING))


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a fast tokenizer's whole definition, except for truncation and padding.

    ValueError for a slow tokenizer, whose definition is code.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} has no definition to compare; use a fast tokenizer"
        )
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    return digest_json(_without(definition, frozenset({"truncation", "padding"})))


def vocabulary_digest(tokenizer: Any, num_rows: int) -> str:
    """Digest of the tokens that the ids below `num_rows` stand for, None where an id has none."""
    tokens: list[str | None] = [None] * num_rows
    for token, index in tokenizer.get_vocab().items():
        if index < num_rows:
            tokens[index] = token
    return digest_json(tokens)


def chat_template_digest(processor: Any) -> str:
    """Digest of the text of the processor's chat template (the tokenizer's may differ)."""
    return digest_json(processor.chat_template)


def image_processor_digest(processor: Any) -> str:
    """Digest of the image processor's class, which tells the backend, and of its settings."""
    image_processor = processor.image_processor
    settings = json.loads(image_processor.to_json_string())
    return digest_json(
        {
            "class": type(image_processor).__name__,
            "settings": _without(settings, _IMAGE_PROCESSOR_BOOKKEEPING),
        }
    )


def _without(value: Any, names: frozenset[str]) -> Any:
    """A JSON value without the entries of the given names, at any depth of its mappings."""
    if isinstance(value, dict):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    if isinstance(value, list):
        return [_without(item, names) for item in value]
    return value
