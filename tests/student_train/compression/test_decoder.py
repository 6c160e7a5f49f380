"""What cannot be compressed is refused before any forward pass, with the remedy."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from student_train.compression.decoder import decoder_of, require_compressible
from tests.support.deep import at, deep_model
from tests.support.lazy import GPT2Config, GPT2LMHeadModel


def test_a_stage_beyond_the_model_is_refused_and_one_behind_the_last_layer_is_not(
    llava: Path,
) -> None:
    model, _ = deep_model(llava)
    require_compressible(model, at(0.5, layer=4))
    with pytest.raises(ValueError, match=r"layer 5, but the decoder of LlavaFor.* has 4 layers"):
        require_compressible(model, at(0.5, layer=5))


def test_other_decoders_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=10))
    with pytest.raises(ValueError, match=r"is a gpt2; tokens can be dropped inside llama, "):
        require_compressible(model, at(0.5, layer=1))


@pytest.mark.parametrize("decoder", ["mistral", None])
def test_sliding_windows_are_refused(decoder: str | None, llava: Path) -> None:
    window: dict[str, Any] = {"sliding_window": 8}
    if decoder is None:
        window |= {
            "use_sliding_window": True,
            "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
        }
    else:
        window |= {"layer_types": None}
    model, _ = deep_model(llava, decoder, **window)
    with pytest.raises(ValueError, match="windows would count dropped tokens"):
        require_compressible(model, at(0.5))


def test_an_attention_that_shows_no_weights_is_refused_to_all_but_random(
    llava: Path,
) -> None:
    model, _ = deep_model(llava)
    attention: Any = decoder_of(model).layers[1].self_attn
    attention.qkv_proj = nn.Identity()
    del attention.q_proj
    with pytest.raises(
        ValueError, match=r"'fastv' needs .* of layer 1, but its Qwen2Attention lacks q_proj"
    ):
        require_compressible(model, at(0.5, "fastv"))
    require_compressible(model, at(0.5, "random"))
    require_compressible(model, at(0.5, "fastv", layer=3))


def test_an_unknown_compressor_is_refused(llava: Path) -> None:
    model, _ = deep_model(llava)
    with pytest.raises(ValueError, match="compressor is 'darts', expected one of dart, "):
        require_compressible(model, at(0.5, "darts"))
