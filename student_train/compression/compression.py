"""Drops vision tokens inside the language model, at the input of chosen decoder layers.

    with compress(model, settings, batch) as compression:
        hidden = final_hidden(model, batch.inputs)          # or model.generate(...)
    compression.layout.columns(row, positions)              # where a sample's tokens now are

Layers from the first stage on get the shorter sequence, with the original positions of its tokens
(rotary embeddings are gathered, mRoPE included). Each sample keeps its own tokens, text is never
dropped, padding stays masked. Where nothing is dropped, inputs are unchanged. The model does not
change: its layers have hooks while the context is open (docs/epic.md says why hooks).
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from student_train.compression.decoder import decoder_of, require_compressible
from student_train.compression.layer_view import AttentionRecorder, LayerView
from student_train.compression.selection import TokenSelector
from student_train.config.compression import CompressionSettings, DropStage
from student_train.data.token_layout import TokenLayout, layout_of
from teacher_cache.encoding.collate import ModelBatch


@contextmanager
def compress(
    model: nn.Module, settings: CompressionSettings, batch: ModelBatch, draw: int = 0
) -> Generator["Compression"]:
    """Drop vision tokens in the model's passes over this batch, as the settings say.

    The model must get exactly this batch, whole; `generate` may continue from it, with a cache or
    without. `draw` numbers the draws of random compressors: one number gives one choice for a
    sample, whatever its batch. ValueError for what `require_compressible` refuses, and in a forward
    pass over another batch. Do not pass labels to the model: its output has the columns of
    `layout`.
    """
    compression = Compression(model, settings, batch, draw)
    handles = compression.attach()
    try:
        yield compression
    finally:
        for handle in handles:
            handle.remove()


class _Shortened(NamedTuple):
    """Inputs that replace those of the layers from a stage on."""

    is_token: Bool[Tensor, "B L"]
    position_embeddings: tuple[Tensor, Tensor]


class Compression:
    """An open `compress` context; `layout` is that of the output of the latest pass."""

    def __init__(
        self, model: nn.Module, settings: CompressionSettings, batch: ModelBatch, draw: int
    ) -> None:
        self._compressor = require_compressible(model, settings)
        self._decoder: Any = decoder_of(model)
        self._batch = batch
        self._selector = TokenSelector(self._compressor, settings, batch, draw)
        depth = len(self._decoder.layers)
        stages = settings.stages if self._selector.has_vision else ()
        self._stages = {s.layer: s for s in stages if s.ratio and s.layer < depth}
        self._recorders: dict[int, AttentionRecorder] = {}
        self.layout: TokenLayout = layout_of(batch)
        """The token that each column of the output belongs to."""
        self._whole = self.layout
        self._cache: Any = None
        # By layer of the stage; only stages that dropped something in the latest whole pass.
        self._shortened: dict[int, _Shortened] = {}
        # The current pass's masks, by layer of the stage.
        self._masks: dict[int, Any] = {}

    def attach(
        self, recorded: Mapping[int, AttentionRecorder] | None = None
    ) -> list[RemovableHandle]:
        """Put hooks on the decoder's layers; removing all of them undoes it.

        `recorded`: by layer of a stage, recorders that already hold what the layer below computed,
        for a pass that starts at that layer.
        """
        layers, handles = self._decoder.layers, list[RemovableHandle]()
        self._recorders = dict(recorded or {})
        for number in self._stages.keys() - self._recorders.keys():
            if self._compressor.needs_attention:
                self._recorders[number] = AttentionRecorder(layers[number - 1])
                handles += self._recorders[number].attach()
        for number in range(min(self._stages, default=len(layers)), len(layers)):

            def enter(
                _module: nn.Module, args: Any, kwargs: dict[str, Any], number: int = number
            ) -> tuple[Any, dict[str, Any]]:
                hidden, kwargs = self._enter(number, args[0], kwargs)
                return (hidden, *args[1:]), kwargs

            handles.append(layers[number].register_forward_pre_hook(enter, with_kwargs=True))
        return handles

    def _enter(
        self, number: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the inputs of decoder layer `number` that replace its own."""
        cache = kwargs.get("past_key_values")
        num_cached = 0 if cache is None else int(cache.get_seq_length(number))
        if number == min(self._stages):
            self._begin(hidden, cache, num_cached)
        if number in self._stages and not num_cached:
            hidden = self._shorten(self._stages[number], hidden, kwargs["position_embeddings"])
        stage = max((layer for layer in self._shortened if layer <= number), default=None)
        if stage is None:
            return hidden, kwargs
        shortened = self._shortened[stage]
        if stage not in self._masks:
            from transformers.masking_utils import create_causal_mask

            num_new = num_cached + hidden.shape[1] - shortened.is_token.shape[1]
            self._masks[stage] = create_causal_mask(
                config=self._decoder.config,
                inputs_embeds=hidden,
                attention_mask=nn.functional.pad(shortened.is_token, (0, num_new), value=True),
                past_key_values=cache,
                layer_idx=number,
            )
        # No position ids: flash kernels would read gaps in them as packed sequences.
        kwargs = {**kwargs, "attention_mask": self._masks[stage], "position_ids": None}
        if not num_cached:
            kwargs["position_embeddings"] = shortened.position_embeddings
        return hidden, kwargs

    def _begin(self, hidden: Tensor, cache: Any, num_cached: int) -> None:
        """Start a pass at the first stage: a whole one, or one that continues from a cache."""
        num_rows, length = self._batch.inputs["input_ids"].shape
        if len(hidden) != num_rows:
            raise ValueError(
                f"the model runs on {len(hidden)} rows, but `compress` was opened with a batch of "
                f"{num_rows}; open it with the batch that goes into the model, one row per answer "
                "(no beams)"
            )
        self._masks.clear()
        if num_cached:
            if cache is not self._cache:
                raise ValueError(
                    "the model continues from a cache that was not filled in this context; run the "
                    "prompt inside the same `with compress(...)`"
                )
            return
        if hidden.shape[1] < length:
            raise ValueError(
                f"the model runs on {hidden.shape[1]} tokens of rows that have {length}; give it "
                "the whole batch at once (no prefill in chunks)"
            )
        self._cache = cache
        self._shortened.clear()
        self.layout = self._whole = layout_of(self._batch, hidden.shape[1] - length)

    def _shorten(
        self, stage: DropStage, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Drop tokens at the input of layer `stage.layer`; return the hidden states that stay.

        `position_embeddings` are those of the whole sequence, as every layer gets them.
        """
        recorder = self._recorders[stage.layer] if self._compressor.needs_attention else None
        view = LayerView(self._compressor.needs, self._decoder.norm, recorder, hidden)
        rows = self._selector.kept_rows(stage, self.layout, view, position_embeddings)
        if all(len(kept) == len(row) for kept, row in zip(rows, self.layout.rows, strict=True)):
            return hidden
        layout = self.layout.only(rows)
        index_BK = self._whole.index_of(layout).to(hidden.device)
        cos, sin = (
            _gather(values.expand(len(rows), -1, -1), index_BK) for values in position_embeddings
        )
        self._shortened[stage.layer] = _Shortened(
            is_token=layout.is_token.to(hidden.device), position_embeddings=(cos, sin)
        )
        hidden = _gather(hidden, self.layout.index_of(layout).to(hidden.device))
        self.layout = layout
        return hidden


def _gather(values: Float[Tensor, "B L D"], index: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))
