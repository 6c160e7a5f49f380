"""Selects the tokens of each sample in a batch that go on, turn by turn.

Promise: a turn's choice depends on its own sample alone, not on batch, padding or row. Text always
goes on. One copy from the device per stage.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from student_train.compression.compressors import Compressor
from student_train.compression.image_turns import image_turns
from student_train.compression.layer_view import LayerView
from student_train.config.compression import CompressionSettings, DropStage
from student_train.data.seeded_random import random_words
from student_train.data.token_layout import TokenLayout
from teacher_cache.encoding.collate import ModelBatch

Embeddings = tuple[Float[Tensor, "_ _ d"], Float[Tensor, "_ _ d"]]
"""Cosines and sines of the whole batch as the decoder computes them: per row, or one for all."""


class TokenSelector:
    """Applies a compressor to a batch; `draw` numbers its random draws."""

    def __init__(
        self, compressor: Compressor, settings: CompressionSettings, batch: ModelBatch, draw: int
    ) -> None:
        self._compressor = compressor
        self._seed, self._draw = settings.seed, draw
        self._batch = batch
        self._turns = [image_turns(sample, settings.text) for sample in batch.samples]

    @property
    def has_vision(self) -> bool:
        """Whether the batch has any vision tokens."""
        return any(self._turns)

    @torch.no_grad()
    def kept_rows(
        self, stage: DropStage, layout: TokenLayout, view: LayerView, embeddings: Embeddings
    ) -> list[Int[Tensor, " _"]]:
        """Return the positions of each sample's tokens that go on, ascending, on the CPU.

        `layout` locates tokens in `view`; `embeddings` are those of the whole batch.
        """
        device = embeddings[0].device
        chosen: list[Tensor] = []
        owners: list[int] = []
        is_kept = [torch.ones(len(tokens), dtype=torch.bool) for tokens in layout.rows]
        for row, (tokens, start) in enumerate(zip(layout.rows, layout.starts, strict=True)):
            for number, turn in enumerate(self._turns[row]):
                vision = turn.vision[layout.kept(row, turn.vision)]
                if not len(vision):
                    continue
                places, words = torch.searchsorted(tokens, vision), None
                if "random_words" in self._compressor.needs:  # by sample, not by batch
                    names = (self._batch.samples[row].key, number, stage.layer, self._draw)
                    words = random_words(self._seed, len(vision), *names)
                is_kept[row][places] = False
                inputs = view.inputs(
                    row,
                    slice(start, start + len(tokens)),
                    self._own_embeddings(row, tokens.to(device), embeddings),
                    places.to(device),
                    torch.searchsorted(tokens, turn.text).to(device),
                    int(torch.searchsorted(tokens, turn.end)),
                    words,
                )
                chosen.append(self._compressor.keep(inputs, stage.ratio))
                owners += [row] * len(chosen[-1])
        for row, place in zip(owners, torch.cat(chosen).tolist() if chosen else [], strict=True):
            is_kept[row][place] = True
        return [tokens[kept] for tokens, kept in zip(layout.rows, is_kept, strict=True)]

    def _own_embeddings(
        self, row: int, tokens: Tensor, embeddings: Embeddings
    ) -> tuple[Float[Tensor, "L d"], Float[Tensor, "L d"]]:
        """Return cosines and sines of a sample's tokens as if it had been run alone.

        Without position ids, a decoder counts columns, left padding included. Attention depends on
        distances only, but norms of rotated keys (DART) would change.
        """
        cos, sin = embeddings
        if len(cos) == 1:
            return cos[0, tokens], sin[0, tokens]
        columns = tokens + self._batch.offsets[row]
        return cos[row, columns], sin[row, columns]
