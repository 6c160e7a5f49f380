"""Defines what every correspondence gets, and what it promises.

A correspondence is a function of a `PairingProblem`. It returns the student and the teacher token
numbers of its pairs, sorted by student token, each student token at most once. It is deterministic
and depends on nothing else, so that micro-batches, threads and resumes change no pair. ValueError
for costs that are NaN or infinite.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from student_train.matching.geometry import TokenPlaces

Pairs = tuple[Int[Tensor, " P"], Int[Tensor, " P"]]


class PairingProblem(NamedTuple):
    """The tokens of one view (or image) of one sample; on the CPU."""

    cost: Float[Tensor, "n m"]
    geometry: TokenPlaces | None = None
    """Where the tokens lie; None for scope=global, whose views may lie anywhere in the image."""
    seed: int = 0
    """A number of the sample and the problem that stays the same for ever."""
    place_weight: float = 0.0

    def places(self) -> TokenPlaces:
        """The geometry; ValueError where there is none."""
        if self.geometry is None:
            raise ValueError(
                "this correspondence needs the places of tokens, which scope `global` does not "
                "know; use scope `view`"
            )
        return self.geometry


Correspondence = Callable[[PairingProblem], Pairs]
