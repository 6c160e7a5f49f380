"""Cuts the sample order into optimizer steps, ranks and micro-batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

MAX_MICRO_BATCH = 8
"""Most samples of one forward pass where the user names no micro_batch_size."""


def micro_batch(batch_size: int, world_size: int) -> int:
    """The largest size of at most MAX_MICRO_BATCH that divides a rank's share of a step."""
    share = batch_size // world_size
    return next(size for size in range(MAX_MICRO_BATCH, 0, -1) if share % size == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """`batch_size` samples a step, over all ranks and micro-batches.

    ValueError unless every rank has the same number of full micro-batches in every step.
    """

    batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size} workers")
        if self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of {self.world_size} workers; "
                "choose a batch_size that is"
            )
        if self.batch_size % (self.micro_batch_size * self.world_size):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {self.world_size} workers; choose a micro_batch_size "
                f"that divides {self.batch_size // self.world_size}"
            )

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one rank in one optimizer step."""
        return self.batch_size // (self.micro_batch_size * self.world_size)

    def positions(self, start: int) -> Iterator[range]:
        """Yield the positions of this rank's micro-batches from `start` on, without end.

        ValueError where `start` is not the first position of a step.
        """
        if start < 0 or start % self.batch_size:
            raise ValueError(f"position {start} is not a multiple of batch_size {self.batch_size}")
        share = self.batch_size // self.world_size
        for begin in count(start + self.rank * share, self.batch_size):
            for first in range(begin, begin + share, self.micro_batch_size):
                yield range(first, first + self.micro_batch_size)
