"""The settings of compression inside the language model: who drops how many tokens, and where.

A stage drops, at the input of one decoder layer, a share of the vision tokens that arrive there:
one stage is EPIC's setting (2510.00515), several are a pyramid such as PyramidDrop's. Settings that
no model could carry out are refused here; those that one model cannot, by `decoder.py`, before a
forward pass. Imports nothing heavy: `emkd --help` reads this.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from teacher_cache.schema.options import TextSource
from teacher_cache.schema.strict_json import StrictRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class DropStage(StrictRecord):
    """Drop a share of the vision tokens at the input of one decoder layer."""

    layer: int
    """Decoder layer, counted from 0, whose input is shortened (EPIC's K). What is kept is decided
    by the layer below, so there is none at 0; the number of layers itself stands behind the last
    layer, where nothing is dropped: layer consistency distillation begins there."""
    ratio: float
    """Share of the vision tokens at this layer's input that are dropped, 0 <= ratio < 1."""

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise ValueError(
                f"a stage is at the input of layer {self.layer}, expected 1 or more: the layer "
                "below it decides which tokens are kept"
            )
        if not 0 <= self.ratio < 1:
            raise ValueError(
                f"the ratio of the stage at layer {self.layer} is {self.ratio}, expected "
                "0 <= ratio < 1; 0.75 keeps a quarter of the vision tokens"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionSettings(StrictRecord):
    """Which compressor, at which stages, and what it may look at."""

    compressor: str = "dart"
    """A name in `compressors.COMPRESSORS`: dart, fastv, random, or one that was registered."""
    stages: tuple[DropStage, ...]
    """Ascending layers; none at all is the uncompressed model."""
    text: TextSource = "instruction"
    """Text that decides what is kept. `instruction`: that of the turn that shows the images, which
    is known before any answer. `released`: all text behind the images, answers included, as in
    EPIC's code: what is kept then depends on the labels, and differs in generation."""
    seed: int = 0
    """Of compressors that draw (random)."""

    def __post_init__(self) -> None:
        layers = [stage.layer for stage in self.stages]
        if any(low >= high for low, high in pairwise(layers)):
            raise ValueError(f"stages are at layers {layers}, expected ascending, each only once")


def grid_ratio(ratios: Iterable[float], wanted: float) -> float:
    """The largest of the ratios that is at most `wanted`, or 0, which every cache has.

    Differences such as 0.7 - 0.2 count as the decimals that they stand for.
    """
    return max((ratio for ratio in ratios if ratio <= wanted + 1e-9), default=0.0)
