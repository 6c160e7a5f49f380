"""Configs that the tiny models share: text and vision models, tiles, a chat template."""

from typing import Any

from tests.support.lazy import Qwen2Config

WIDTH = 32
HEAD_ROWS = 384
"""Rows of every LM head: more than the tokenizers have entries, as in released models."""


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template(image: str) -> str:
    return CHAT_TEMPLATE.replace("IMAGE", image)


def text_settings() -> dict[str, Any]:
    return {
        "vocab_size": HEAD_ROWS,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def text_model(tied: bool = True) -> Qwen2Config:
    return Qwen2Config(**text_settings(), tie_word_embeddings=tied)


VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
SIZE = {"height": 16, "width": 16}
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
