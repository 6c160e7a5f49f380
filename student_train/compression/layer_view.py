"""Reads states, keys and one row of attention from the layer below a stage, for each sample.

Promise: queries and keys are recorded where the layer's own projections compute them. So any
attention kernel works (FlashAttention included), and nothing is computed twice. The row of
attention is computed from them as eager kernels would. Inputs hold no padding and no other samples.

Dimensions as in compressors.py; B batch, H heads, G heads of the keys (grouped queries), d width
of a head.
"""

import sys
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from student_train.compression.compressors import CompressorInputs, Need


class AttentionRecorder:
    """Records the queries and keys that a layer's attention computes."""

    def __init__(self, layer: Any) -> None:
        self.attention: Any = layer.self_attn
        self._seen: dict[str, Tensor] = {}

    def attach(self) -> list[RemovableHandle]:
        """Hook the last modules before the rotary embedding: Qwen3's norms, else projections."""
        handles: list[RemovableHandle] = []
        for letter in ("q", "k"):
            norm, projection = f"{letter}_norm", f"{letter}_proj"
            name = norm if hasattr(self.attention, norm) else projection
            module: nn.Module = getattr(self.attention, name)

            def record(_m: nn.Module, _i: object, output: Tensor, letter: str = letter) -> None:
                self._seen[letter] = output.detach()

            handles.append(module.register_forward_hook(record))
        return handles

    def copy(self) -> "AttentionRecorder":
        """Return an unattached recorder of the same layer with the same recorded tensors."""
        copied = AttentionRecorder.__new__(AttentionRecorder)
        copied.attention, copied._seen = self.attention, dict(self._seen)
        return copied

    def take(self) -> tuple[Float[Tensor, "B H L d"], Float[Tensor, "B G L d"]]:
        """Return and forget the queries and keys of the latest call, before rotary embedding."""
        width: int = self.attention.head_dim
        query, key = (
            self._seen.pop(letter).flatten(2).unflatten(2, (-1, width)).transpose(1, 2)
            for letter in ("q", "k")
        )
        return query, key

    def rotate(
        self,
        query: Float[Tensor, "H L d"],
        keys: Float[Tensor, "G L d"],
        position_embeddings: tuple[Tensor, Tensor],
    ) -> tuple[Float[Tensor, "H L d"], Float[Tensor, "G L d"]]:
        """Apply the attention's own rotary embedding to one sample."""
        rotary = sys.modules[type(self.attention).__module__].apply_rotary_pos_emb
        cos, sin = position_embeddings
        query, keys = rotary(query[None], keys[None], cos[None], sin[None])
        return query[0], keys[0]


class LayerView:
    """The output of the layer below a stage, and the queries and keys that `recorder` holds.

    Without gradients: choosing tokens is not part of the model.
    """

    @torch.no_grad()
    def __init__(
        self,
        needs: frozenset[Need],
        final_norm: nn.Module,
        recorder: AttentionRecorder | None,
        hidden: Float[Tensor, "B L D"],
    ) -> None:
        self._needs = needs
        self._states: Tensor | None = final_norm(hidden) if "states" in needs else None
        self._recorder = recorder
        self._seen = None if recorder is None else recorder.take()

    def inputs(
        self,
        row: int,
        columns: slice,
        position_embeddings: tuple[Float[Tensor, "L d"], Float[Tensor, "L d"]],
        vision: Int[Tensor, " M"],
        text: Int[Tensor, " T"],
        end: int,
        random_words: UInt64[np.ndarray, " M"] | None,
    ) -> CompressorInputs:
        """Return a compressor's inputs for one turn of the sample at `columns` of batch row `row`.

        `vision`, `text` and `end` count from the first column; cosines and sines are those of the
        sample's own tokens.
        """
        states = keys = attention = None
        if self._states is not None:
            states = self._states[row, columns]
        if self._recorder is not None and self._seen is not None:
            query_HLd, keys_GLd = (of_batch[row, :, columns] for of_batch in self._seen)
            query_HLd, keys_GLd = self._recorder.rotate(query_HLd, keys_GLd, position_embeddings)
            if "keys" in self._needs:
                keys = keys_GLd.transpose(0, 1).flatten(1)
            if "attention" in self._needs:
                scaling = self._recorder.attention.scaling
                attention = attention_row(query_HLd[:, end], keys_GLd, end, scaling)
        return CompressorInputs(
            vision=vision,
            instruction=text,
            states=states,
            keys=keys,
            attention=attention,
            random_words=random_words,
        )


def attention_row(
    query: Float[Tensor, "H d"], keys: Float[Tensor, "G L d"], row: int, scaling: float
) -> Float[Tensor, " L"]:
    """Return the causal attention of one token to its sample, mean over heads; 0 after the token.

    `query` belongs to row `row`; H is a multiple of G. Computed in float32 or wider.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped_GHd = query.to(dtype).unflatten(0, (len(keys), -1))
    scores = grouped_GHd @ keys[:, : row + 1].to(dtype).transpose(1, 2) * scaling
    weights_L = scores.softmax(dim=-1).flatten(0, 1).mean(dim=0)
    return nn.functional.pad(weights_L, (0, keys.shape[1] - row - 1))
