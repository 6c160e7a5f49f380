"""Computes which samples go to which shard, and in which order. Reads no files."""

from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence


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
