"""Chooses which vision tokens are kept: DART, FastV and Random (EPIC, arXiv 2510.00515).

Promise: a choice is a pure function of one turn of one sample. At ratio 0 all are kept. Counts are
those of the released code, with the ratio read as a decimal (0.9 of 10 keeps 1, where floating
point would keep 0). Ties go to the earlier position. To add a compressor, write a keep function and
call `register(Compressor(...))`.

Legend: L tokens of the sample at layer K's input, M vision tokens and T instruction tokens of the
turn, D width of the states, C width of the keys (all heads side by side).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt64
from torch import Tensor
from torch.nn import functional

from student_train.ops.precision import at_least_float32

NUM_PIVOTS = 4
"""DART's pivots among the images and among the text, each."""

Need = Literal["states", "keys", "attention", "random_words"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressorInputs:
    """What a compressor gets: one turn of one sample, at the input of layer K.

    `vision` (never empty) and `instruction` (may be empty) are ascending rows of `states` and
    `keys`. What the compressor does not need is None.
    """

    vision: Int[Tensor, " M"]
    instruction: Int[Tensor, " T"]
    states: Float[Tensor, "L D"] | None = None
    """Output of layer K-1, through the model's *final* norm."""
    keys: Float[Tensor, "L C"] | None = None
    """Keys of layer K-1 after rotary embedding."""
    attention: Float[Tensor, " L"] | None = None
    """Layer K-1's attention from the last token of the turn's prompt, mean over heads."""
    random_words: UInt64[np.ndarray, " M"] | None = None
    """Random 64-bit words for this sample, turn, layer and draw."""


KeepSet = Callable[[CompressorInputs, float], Int[Tensor, " K"]]
"""Maps the inputs and the ratio to drop to the kept vision positions, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressor:
    """A named keep function and the inputs that it needs."""

    name: str
    needs: frozenset[Need]
    keep: KeepSet

    @property
    def needs_attention(self) -> bool:
        """Whether it needs anything that a layer's attention computes."""
        return bool(self.needs & {"keys", "attention"})


COMPRESSORS: dict[str, Compressor] = {}
"""Compressors by name; add one with `register`."""


def register(compressor: Compressor) -> None:
    """Register a compressor under its name; ValueError where the name is taken."""
    if compressor.name in COMPRESSORS:
        raise ValueError(f"there is a compressor {compressor.name!r} already; choose another name")
    COMPRESSORS[compressor.name] = compressor


def find_compressor(name: str) -> Compressor:
    """Return the compressor of that name; ValueError lists the known ones."""
    if name not in COMPRESSORS:
        raise ValueError(
            f"compressor is {name!r}, expected one of {', '.join(sorted(COMPRESSORS))}; register "
            "another first (student_train.compression.compressors.register)"
        )
    return COMPRESSORS[name]


def num_kept(ratio: float, num_tokens: int, num_parts: int = 1) -> int:
    """Return floor((1 - ratio) * num_tokens / num_parts), with the ratio read as a decimal."""
    return math.floor((1 - Fraction(repr(float(ratio)))) * num_tokens / num_parts)


def dart_keep(inputs: CompressorInputs, ratio: float) -> Int[Tensor, " K"]:
    """DART: keep pivots and, for each pivot, the vision tokens that resemble it least.

    Pivots are the 4 vision and the 4 text tokens whose keys have the largest L1 norm (fewer where
    there are fewer). In order of position, vision before text, each pivot takes the
    m = floor((1 - ratio) M / pivots) free vision tokens whose states have the lowest cosine with
    its own. Kept are the vision pivots and all taken tokens: 8 m + 4, at most M.
    """
    assert inputs.states is not None
    assert inputs.keys is not None
    vision, text = inputs.vision, inputs.instruction
    if ratio == 0:
        return vision
    norms_L = at_least_float32(inputs.keys).abs().sum(dim=1)
    first = _largest(norms_L[vision], NUM_PIVOTS)
    pivots = torch.cat([vision[first], text[_largest(norms_L[text], NUM_PIVOTS)]])
    unit_LD = functional.normalize(at_least_float32(inputs.states), dim=1)
    cosine_PM = unit_LD[pivots] @ unit_LD[vision].T
    share = num_kept(ratio, len(vision), len(pivots))
    cosine_PM[:, first] = torch.inf
    chosen, num_free = [first], len(vision) - len(first)
    for row in range(len(pivots)):
        taken = cosine_PM[row].argsort(stable=True)[: min(share, num_free)]
        cosine_PM[:, taken] = torch.inf
        num_free -= len(taken)
        chosen.append(taken)
    return vision[torch.cat(chosen).sort().values]


def fastv_keep(inputs: CompressorInputs, ratio: float) -> Int[Tensor, " K"]:
    """FastV: keep the floor((1 - ratio) M) vision tokens that receive most attention."""
    assert inputs.attention is not None
    vision = inputs.vision
    return vision[_largest(inputs.attention[vision], num_kept(ratio, len(vision)))]


def random_keep(inputs: CompressorInputs, ratio: float) -> Int[Tensor, " K"]:
    """Random: keep the floor((1 - ratio) M) vision tokens with the smallest random words."""
    assert inputs.random_words is not None
    vision, order = inputs.vision, np.argsort(inputs.random_words, kind="stable")
    chosen = np.sort(order[: num_kept(ratio, len(vision))])
    return vision[torch.from_numpy(chosen).to(vision.device)]


def _largest(values: Float[Tensor, " M"], count: int) -> Int[Tensor, " K"]:
    """Indices of the `count` largest values (or of all), ascending."""
    return values.argsort(descending=True, stable=True)[:count].sort().values


register(Compressor(name="dart", needs=frozenset[Need]({"states", "keys"}), keep=dart_keep))
register(Compressor(name="fastv", needs=frozenset[Need]({"attention"}), keep=fastv_keep))
register(Compressor(name="random", needs=frozenset[Need]({"random_words"}), keep=random_keep))
