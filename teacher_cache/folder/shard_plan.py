"""Arithmetic of shards: which samples, in which order, for which shard. Reads no files.

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
    """0 ... count - 1, each once, so that every prefix is spread over the range (van der Corput).

    Samples taken in this order come from the whole source, however many are taken.
    """
    bits = max(0, count - 1).bit_length()
    for number in range(2**bits):
        place = sum(1 << (bits - 1 - bit) for bit in range(bits) if number >> bit & 1)
        if place < count:
            yield place


def shard_of(starts: Sequence[int], index: int) -> int:
    """The shard that holds row `index`; `starts` are the shards' first rows, then the total."""
    return bisect_right(starts, index) - 1
