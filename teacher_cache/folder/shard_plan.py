"""Arithmetic of shards and orders: which samples, in which order, for whom. Knows no files.

A cache's shards are cut from a source's order by `group_shards`, which puts together what may share
a vision record; a sketch is calibrated in `spread_order`.

The student's order is an endless sequence of epochs, each a permutation of all rows, and a pure
function of (shard sizes, seed, window): shards are permuted, cut into windows of a few shards, and
rows are permuted inside each window, so that few shards are touched at a time. Global batch b of
size G is positions b*G .. (b+1)*G - 1; the last batch of an epoch runs on into the next. A state
is one integer, the position; the number of workers may change at any batch.

Only raw Philox words are used (a fixed algorithm, Salmon et al. 2011), sorted stably; numpy does
not promise that `Generator.permutation` stays the same from version to version.
"""

from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int64]


def group_shards(groups: Sequence[Hashable | None], size: int) -> list[list[int]]:
    """Positions of samples, shard by shard, the members of a group next to each other.

    `groups[i]` is the group of sample i, None for a sample that stands alone. Groups come in order
    of first appearance, their members in order. A shard has at most `size` samples and cuts only
    groups that are larger than that.
    """
    if size < 1:
        raise ValueError(f"shards of {size} samples; give at least 1")
    members: dict[tuple[bool, Hashable], list[int]] = {}
    for position, group in enumerate(groups):
        name = (False, position) if group is None else (True, group)
        members.setdefault(name, []).append(position)
    shards: list[list[int]] = []
    for positions in members.values():
        if not shards or len(shards[-1]) + len(positions) > size:
            shards += [positions[at : at + size] for at in range(0, len(positions), size)]
        else:
            shards[-1] += positions
    return shards


def spread_order(count: int) -> Iterator[int]:
    """0 ... count - 1, each once, every beginning of it spread over the whole (van der Corput).

    So that samples taken until there are enough come from all of a source, however many it takes.
    """
    bits = max(0, count - 1).bit_length()
    for number in range(2**bits):
        place = sum(1 << (bits - 1 - bit) for bit in range(bits) if number >> bit & 1)
        if place < count:
            yield place


def shard_of(starts: Sequence[int], index: int) -> int:
    """The shard that holds row `index`; `starts` are the shards' first rows, then the total."""
    return bisect_right(starts, index) - 1


class SampleOrder:
    """The endless shuffled order: position p -> row, rows counted over all shards in order."""

    def __init__(self, shard_sizes: Sequence[int], seed: int, window: int) -> None:
        if sum(shard_sizes) < 1 or min(shard_sizes) < 0:
            raise ValueError(f"an order needs rows; found shards of {list(shard_sizes)[:10]}")
        if window < 1 or not 0 <= seed < 2**64:
            raise ValueError(f"expected window >= 1, 0 <= seed < 2**64; found {window}, {seed}")
        self.num_rows = sum(shard_sizes)
        self._sizes = np.array(shard_sizes, dtype=np.int64)
        self._starts = [0, *accumulate(shard_sizes)]
        self._seed = seed
        self._window = window
        # The latest epoch's shard order and the latest window's rows, with what they belong to.
        self._epoch: tuple[int, _Ints, list[int]] | None = None
        self._rows: tuple[int, int, _Ints] | None = None

    def index_at(self, position: int) -> int:
        """The row at a position of the endless order."""
        if position < 0:
            raise ValueError(f"positions count from 0, found {position}")
        epoch, offset = divmod(position, self.num_rows)
        shards, starts = self._shards_of(epoch)
        number = bisect_right(starts, offset) - 1
        return int(self._rows_of(epoch, number, shards)[offset - starts[number]])

    def _shards_of(self, epoch: int) -> tuple[_Ints, list[int]]:
        """Order of the shards in an epoch, and the offset at which each window begins."""
        cached = self._epoch
        if cached is None or cached[0] != epoch:
            shards = self._permutation(epoch, 0, len(self._sizes))
            ends = np.cumsum(self._sizes[shards])[self._window - 1 :: self._window]
            cached = (epoch, shards, [0, *ends.tolist()])
            self._epoch = cached
        return cached[1], cached[2]

    def _rows_of(self, epoch: int, number: int, shards: _Ints) -> _Ints:
        cached = self._rows
        if cached is None or cached[:2] != (epoch, number):
            members: list[int] = shards[
                number * self._window : (number + 1) * self._window
            ].tolist()
            rows = np.concatenate(
                [np.arange(self._starts[shard], self._starts[shard + 1]) for shard in members]
            )
            cached = (epoch, number, rows[self._permutation(epoch, number + 1, len(rows))])
            self._rows = cached
        return cached[2]

    def _permutation(self, epoch: int, stream: int, count: int) -> _Ints:
        # Key and counter make every (seed, epoch, stream) a sequence of its own.
        words = np.random.Philox(
            key=np.array([self._seed, epoch], dtype=np.uint64),
            counter=np.array([0, 0, 0, stream], dtype=np.uint64),
        ).random_raw(count)
        return np.argsort(words, kind="stable")


def owned_positions(start: int, batch_size: int, rank: int, world_size: int) -> range:
    """Rank `rank`'s contiguous share of the global batch that begins at position `start`."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} workers")
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"a global batch of {batch_size} samples cannot be shared evenly by {world_size} "
            f"workers; make batch_size a multiple of {world_size}"
        )
    share = batch_size // world_size
    return range(start + rank * share, start + (rank + 1) * share)


def micro_batches(positions: range, size: int) -> tuple[range, ...]:
    """Cut a worker's share into forward passes of `size` samples; the last may be smaller."""
    if size < 1:
        raise ValueError(f"a forward pass of {size} samples; give at least 1")
    return tuple(positions[start : start + size] for start in range(0, len(positions), size))
