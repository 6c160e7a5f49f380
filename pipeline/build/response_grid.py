"""Runs a teacher that drops its own vision tokens, at each ratio of a cache's grid.

One whole pass over a batch, then for each ratio the layers from the grid's on once more
(`rerun_from_layer`; bit-equal to a whole pass under `compress`). The same batch gives the same
bits. Refuses teachers that cannot drop tokens there, before a sample is read.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from student_train.compression.compressors import find_compressor
from student_train.compression.decoder import require_compressible, require_effect
from student_train.config.compression import CompressionSettings
from student_train.epic.partial_rerun import record_entry, rerun_from_layer
from teacher_cache.encoding.collate import ModelBatch
from teacher_cache.schema.options import GridSettings
from teacher_cache.teacher.teacher import PredictingStates, Teacher


def compression_at(grid: GridSettings, ratio: float) -> CompressionSettings:
    """The settings of `compress` that give the grid's records at one ratio."""
    return CompressionSettings.at_layer(grid.layer, ratio, grid.compressor, grid.text, grid.seed)


def require_compressor(grid: GridSettings | None) -> None:
    """Raise ValueError for an unknown compressor, before a teacher is loaded."""
    if grid is not None:
        find_compressor(grid.compressor)


def with_grid(teacher: Teacher, grid: GridSettings | None) -> Teacher:
    """The teacher, ready to compute the records of this grid; ValueError if it cannot."""
    if grid is not None:
        compression = compression_at(grid, grid.ratios[-1])
        require_compressible(teacher.model, compression)
        require_effect(teacher.model, compression)
        teacher.grid_passes = Passes(teacher.model)
    return teacher


class Passes:
    """`teacher_cache.teacher.GridPasses` of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(
        self, grid: GridSettings, batch: ModelBatch, whole: Callable[[], Tensor]
    ) -> tuple[Float[Tensor, "B L D"], Sequence[PredictingStates]]:
        """The states of `whole`, and each sample's predicting states at every ratio."""
        found: list[dict[float, Tensor]] = [{} for _ in batch.samples]
        with record_entry(self.model, grid.layer) as entry:
            states = whole()
            for ratio in grid.ratios:
                hidden, layout = rerun_from_layer(
                    self.model, entry, compression_at(grid, ratio), batch
                )
                for row, sample in enumerate(batch.samples):
                    columns = layout.columns(row, sample.spans.predicting)
                    found[row][ratio] = hidden[row, columns.to(hidden.device)]
        return states, found
