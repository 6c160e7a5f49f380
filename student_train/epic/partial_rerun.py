"""Runs the decoder's upper layers a second time, from the recorded input of layer K.

    with record_entry(model, K) as entry, compress(model, student, batch) as found:
        hidden = final_hidden(model, batch.inputs)
    with torch.no_grad():
        teacher_hidden, layout = rerun_from_layer(model, entry, teacher, batch)

EPIC's teacher is the student itself with fewer tokens dropped: all below layer K has the same
weights and inputs in both passes. Promise: `rerun_from_layer` returns what a second whole pass
would (a decoder without dropout; bit-equal on one device), at the cost of the layers from K on.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from student_train.compression.compression import Compression
from student_train.compression.decoder import decoder_of
from student_train.compression.layer_view import AttentionRecorder
from student_train.config.compression import CompressionSettings
from student_train.data.token_layout import TokenLayout
from teacher_cache.encoding.collate import ModelBatch


class LayerEntry:
    """The latest input of decoder layer `layer`, and the queries and keys of the layer below.

    Holds hidden states with their graph: drop it when the step is done.
    """

    def __init__(self, layer: int, recorder: AttentionRecorder) -> None:
        self.layer = layer
        self.recorder = recorder
        self.hidden: Tensor | None = None
        self.arguments: dict[str, Any] = {}
        self.autocast: torch.dtype | None = None
        """Autocast dtype of the pass: accelerate sets it only inside the model's forward."""

    def record(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Record the layer's input (a forward pre-hook)."""
        self.hidden, self.arguments = args[0], kwargs
        device = args[0].device.type
        enabled = torch.is_autocast_enabled(device)
        self.autocast = torch.get_autocast_dtype(device) if enabled else None


@contextmanager
def record_entry(model: nn.Module, layer: int) -> Generator[LayerEntry]:
    """Record the input of decoder layer `layer` (1 or more) in passes inside this context."""
    layers = decoder_of(model).layers
    if not 1 <= layer < len(layers):
        raise ValueError(
            f"the entry to record is at layer {layer}, but the decoder of {type(model).__name__} "
            f"has {len(layers)} layers; choose 1 to {len(layers) - 1}"
        )
    entry = LayerEntry(layer, AttentionRecorder(layers[layer - 1]))
    # Runs before the hook of `compress`, whichever context was opened first.
    before = layers[layer].register_forward_pre_hook(entry.record, with_kwargs=True, prepend=True)
    handles = [before, *entry.recorder.attach()]
    try:
        yield entry
    finally:
        for handle in handles:
            handle.remove()


def rerun_from_layer(
    model: nn.Module,
    entry: LayerEntry,
    settings: CompressionSettings,
    batch: ModelBatch,
    draw: int = 0,
) -> tuple[Float[Tensor, "B L D"], TokenLayout]:
    """Return final hidden states of the recorded pass under other settings, and their layout.

    `batch` is that of the pass. Call it under `torch.no_grad` for a teacher. ValueError where a
    stage is below the entry, where nothing was recorded, and for what `compress` refuses.
    """
    low = [stage.layer for stage in settings.stages if stage.layer < entry.layer]
    if low or entry.hidden is None:
        found = f"a stage is at layer {low[0]}" if low else "no pass was recorded"
        raise ValueError(
            f"{found}, but the layers are run again from {entry.layer} on; run the model inside "
            "`record_entry`, with its layer no deeper than the first stage of either pass"
        )
    decoder: Any = decoder_of(model)
    compression = Compression(model, settings, batch, draw)
    handles = compression.attach({entry.layer: entry.recorder.copy()})
    arguments = {**entry.arguments, "past_key_values": None, "use_cache": False}
    hidden, dtype = entry.hidden, entry.autocast
    try:
        with torch.autocast(hidden.device.type, dtype=dtype, enabled=dtype is not None):
            for layer in decoder.layers[entry.layer :]:
                hidden = layer(hidden, **arguments)
            return decoder.norm(hidden), compression.layout
    finally:
        for handle in handles:
            handle.remove()
