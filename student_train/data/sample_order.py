"""Decides the shuffle order of samples: a pure function of shard sizes, seed, window, skipped rows.

Each epoch permutes the shards, cuts them into windows, and permutes the rows inside each window.
Skipped rows are in no shard: the order is that of a cache without them.
"""

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from teacher_cache.schema.fingerprint import digest_json
from teacher_cache.schema.strict_json import StrictRecord

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedSamples(StrictRecord):
    """Names a set of samples that are left out: part of the identity of a run."""

    num_samples: int
    digest: str
    """Of their keys, in the order of the cache."""


def skipped_samples(keys: Sequence[str]) -> SkippedSamples | None:
    """The record of these keys; None where there are none."""
    return SkippedSamples(num_samples=len(keys), digest=digest_json(list(keys))) if keys else None


class SampleOrder:
    """The endless shuffled order: position -> row, counted over all shards in order."""

    def __init__(
        self, shard_sizes: Sequence[int], seed: int, window: int, skipped: Collection[int] = ()
    ) -> None:
        if sum(shard_sizes) < 1 or min(shard_sizes) < 0:
            raise ValueError(f"an order needs rows; found shards of {list(shard_sizes)[:10]}")
        if window < 1 or not 0 <= seed < 2**64:
            raise ValueError(f"expected window >= 1, 0 <= seed < 2**64; found {window}, {seed}")
        self._kept: _Ints = np.setdiff1d(
            np.arange(sum(shard_sizes)), np.array([*skipped], np.int64)
        )
        self.num_rows = len(self._kept)
        if not self.num_rows:
            raise ValueError(f"an order needs rows; all {sum(shard_sizes)} are skipped")
        ends = np.searchsorted(self._kept, [0, *accumulate(shard_sizes)])
        self._sizes: _Ints = np.diff(ends)
        self._starts: list[int] = ends.tolist()
        self._seed = seed
        self._window = window
        # Caches of the latest epoch's shard order and the latest window's rows, with their keys.
        self._epoch: tuple[int, _Ints, list[int]] | None = None
        self._rows: tuple[int, int, _Ints] | None = None

    def index_at(self, position: int) -> int:
        """Return the row at a position of the endless order."""
        if position < 0:
            raise ValueError(f"positions count from 0, found {position}")
        epoch, offset = divmod(position, self.num_rows)
        shards, starts = self._shards_of(epoch)
        number = bisect_right(starts, offset) - 1
        return int(self._kept[self._rows_of(epoch, number, shards)[offset - starts[number]]])

    def _shards_of(self, epoch: int) -> tuple[_Ints, list[int]]:
        """The order of the shards in an epoch, and the offset where each window begins."""
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
        # Key and counter give every (seed, epoch, stream) its own sequence.
        words = np.random.Philox(
            key=np.array([self._seed, epoch], dtype=np.uint64),
            counter=np.array([0, 0, 0, stream], dtype=np.uint64),
        ).random_raw(count)
        return np.argsort(words, kind="stable")
