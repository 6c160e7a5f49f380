"""Settings of compression inside the language model: what is dropped where, by which compressor.

One drop stage is EPIC's setting (arXiv 2510.00515), several are a pyramid such as PyramidDrop's.
Settings that no model could carry out are refused here; those that a given model cannot, by
`decoder.py` before its first forward pass. Imports nothing heavy.
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
    """Decoder layer, counted from 0, whose input is shortened (EPIC's K). At least 1: the layer
    below decides which tokens are kept. The number of layers means after the last layer, where
    nothing is dropped (LCD begins there)."""
    ratio: float
    """Share of the vision tokens at this layer's input to drop, 0 <= ratio < 1."""

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
    """Which compressor, its drop stages, and the text that it may use."""

    compressor: str = "dart"
    """A name in `compressors.COMPRESSORS`: dart, fastv, random, or a registered one."""
    stages: tuple[DropStage, ...]
    """Ascending layers; empty for the uncompressed model."""
    text: TextSource = "instruction"
    """Text that decides what is kept. `instruction`: the user's text in the turn that shows the
    images, known before the answer. `released`: all text after the images, answers included, as in
    EPIC's code; then the kept tokens depend on the labels and differ in generation."""
    seed: int = 0
    """Seed of the compressor random."""

    def __post_init__(self) -> None:
        layers = [stage.layer for stage in self.stages]
        if any(low >= high for low, high in pairwise(layers)):
            raise ValueError(f"stages are at layers {layers}, expected ascending, each only once")

    @classmethod
    def at_layer(
        cls,
        layer: int,
        ratio: float,
        compressor: str = "dart",
        text: TextSource = "instruction",
        seed: int = 0,
    ) -> "CompressionSettings":
        """Return settings with one stage, as EPIC has."""
        stages = (DropStage(layer=layer, ratio=ratio),)
        return cls(compressor=compressor, stages=stages, text=text, seed=seed)


def grid_ratio(ratios: Iterable[float], wanted: float) -> float:
    """Return the largest ratio that is at most `wanted`, or 0, which every cache has.

    Differences such as 0.7 - 0.2 are compared as decimals.
    """
    return max((ratio for ratio in ratios if ratio <= wanted + 1e-9), default=0.0)
