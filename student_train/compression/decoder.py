"""Finds a model's text decoder, and refuses compression that it cannot carry out.

Refused before any forward pass: decoders outside `DECODERS` (the ones that were tried), sliding
windows (they would count dropped tokens), stages beyond the last layer, and compressors that need
keys or attention of an attention module that does not expose them.
"""

import sys
from typing import Any

from torch import nn

from student_train.compression.compressors import Compressor, find_compressor
from student_train.config.compression import CompressionSettings

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text")
"""Model types of text decoders whose layers take hidden states and `position_embeddings` and no
other features, and where only the rotary embedding depends on positions."""

_ATTENTION_ATTRIBUTES = ("q_proj", "k_proj", "head_dim", "scaling")


def decoder_of(model: nn.Module) -> Any:
    """Return the text decoder of a model, which may be wrapped (DDP) or compiled."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False).get_decoder()


def require_compressible(model: nn.Module, settings: CompressionSettings) -> Compressor:
    """Raise ValueError, with the remedy, where the model cannot carry out the settings.

    Returns the settings' compressor. Runs no forward pass. Call it where a run begins; `compress`
    calls it again.
    """
    compressor = find_compressor(settings.compressor)
    decoder = decoder_of(model)
    name, config = type(model).__name__, decoder.config
    if config.model_type not in DECODERS:
        raise ValueError(
            f"the decoder of {name} is a {config.model_type}; tokens can be dropped inside "
            f"{', '.join(DECODERS)} only"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    window = None if kinds else getattr(config, "sliding_window", None)
    if kinds - {"full_attention"} or window is not None:
        raise ValueError(
            f"the decoder of {name} has sliding-window attention, whose windows would count "
            "dropped tokens; where no sequence is longer than the window, set sliding_window to "
            "null (and layer_types to full_attention) in its config"
        )
    num_layers = len(decoder.layers)
    for stage in settings.stages:
        if stage.layer > num_layers:
            raise ValueError(
                f"a stage is at layer {stage.layer}, but the decoder of {name} has {num_layers} "
                f"layers; choose 1 to {num_layers - 1} ({num_layers}, behind the last, drops none)"
            )
        if stage.layer < num_layers and compressor.needs_attention:
            _require_shown(decoder.layers[stage.layer - 1], stage.layer - 1, compressor)
    return compressor


def require_effect(model: nn.Module, settings: CompressionSettings) -> None:
    """Raise ValueError for a drop after the last layer, which would change no output."""
    num_layers = len(decoder_of(model).layers)
    if any(stage.ratio and stage.layer == num_layers for stage in settings.stages):
        raise ValueError(
            f"dropping at layer {num_layers} would have no effect: the model has {num_layers} "
            f"layers and no layer after the last would see the drop; choose 1 to {num_layers - 1}"
        )


def _require_shown(layer: Any, number: int, compressor: Compressor) -> None:
    attention = layer.self_attn
    lacks = [name for name in _ATTENTION_ATTRIBUTES if not hasattr(attention, name)]
    if not hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb"):
        lacks.append("apply_rotary_pos_emb")
    if lacks:
        raise ValueError(
            f"compressor {compressor.name!r} needs keys or attention of layer {number}, but its "
            f"{type(attention).__name__} lacks {', '.join(lacks)}; take compressor 'random', or "
            "load the model with transformers' own attention modules"
        )
