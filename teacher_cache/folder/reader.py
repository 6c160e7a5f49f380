"""Reads a sealed cache: any sample, any of its parts, every byte checked before use.

Only the seal says which files count; folders are never listed. Refuses, with the remedy, a cache
that is incomplete, of another layout, or whose files are not the committed ones. Damage is a
`ShardCorruptError` that names file and sample. Several threads can call `read`; a reader sent to
another process opens its folder again.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection
from itertools import accumulate
from typing import TypeVar

from teacher_cache.codec.columns import Part
from teacher_cache.folder.layout import (
    HEAD_FILE,
    REMEDY,
    SKETCH_FILE,
    open_shard,
    read_head,
    read_sketch,
    read_template,
    require_same_plan,
    require_seal,
    require_shard_files,
    shard_keys,
)
from teacher_cache.folder.shard_plan import shard_of
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import SketchBasis
from teacher_cache.records.tail_template import TailTemplate
from teacher_cache.schema.errors import CacheMismatchError, ShardCorruptError
from teacher_cache.schema.manifest import LAYOUT_VERSION, CacheSpec, Plan, Seal
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.shards.rows import read_sample, require_parts, tier_parts
from teacher_cache.shards.shard import Shard
from teacher_cache.storage.open_store import open_store
from teacher_cache.storage.store import Location, Store

_MAX_OPEN_SHARDS = 64

_A = TypeVar("_A", LmHead, SketchBasis)


class CacheReader:
    """Random access to the samples of a sealed cache; sample i is row i over all shards."""

    def __init__(self, cache: Store, plan: Plan, seal: Seal) -> None:
        """Use `CacheReader.open`."""
        self.cache = cache
        self.seal = seal
        self._plan = plan
        keys_of_shards = [shard_keys(plan, commit) for commit in seal.shards]
        self.keys: tuple[str, ...] = tuple(key for keys in keys_of_shards for key in keys)
        """The key of every sample, in order."""
        self.shard_sizes: tuple[int, ...] = tuple(len(keys) for keys in keys_of_shards)
        """Rows of every shard, in order."""
        self._starts = [0, *accumulate(self.shard_sizes)]
        self._numbers: dict[str, int] = {}
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._opening: dict[int, threading.Lock] = {}

    @classmethod
    def open(cls, location: Location) -> "CacheReader":
        """Open a sealed cache by folder or URL; checks that each shard has its committed size.

        Raises `IncompleteCacheError`, `CacheMismatchError` (another layout; seal and plan differ)
        and `ShardCorruptError`.
        """
        cache = open_store(location)
        seal = require_seal(cache)
        if seal.spec.layout_version != LAYOUT_VERSION:
            raise CacheMismatchError(
                f"{cache} has layout {seal.spec.layout_version}, this emkd reads {LAYOUT_VERSION}; "
                "build it again"
            )
        plan = require_same_plan(cache, seal)
        require_shard_files(cache, seal.shards)
        return cls(cache, plan, seal)

    def __reduce__(self) -> tuple[object, tuple[Store]]:
        return (CacheReader.open, (self.cache,))

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"CacheReader({str(self.cache)!r}, {self.seal!r})"

    @property
    def spec(self) -> CacheSpec:
        """The settings of the records, and the identity of the teacher."""
        return self.seal.spec

    @property
    def fingerprint(self) -> str:
        """The identity of the cache."""
        return self.seal.fingerprint

    @property
    def parts(self) -> frozenset[Part]:
        """The parts that every sample has."""
        return tier_parts(self.spec)

    def read(self, index: int, parts: Collection[Part]) -> CachedSample:
        """Sample `index` with the given parts; the others are None and stay unread.

        Raises ValueError for parts that the cache does not hold, `ShardCorruptError` for damage.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        require_parts(parts, self.spec)
        number = shard_of(self._starts, index)
        shard, row = self._shard(number), index - self._starts[number]
        try:
            return read_sample(shard, row, self.keys[index], parts, self.spec)
        except ShardCorruptError as error:
            raise ShardCorruptError(f"{error}; {REMEDY}") from error

    def find(self, key: str) -> int:
        """The number of the sample with this key; ValueError if the cache has none."""
        if not self._numbers:
            self._numbers = {known: number for number, known in enumerate(self.keys)}
        if key not in self._numbers:
            raise ValueError(f"{self.cache} has no sample {key!r}; it has {len(self)} others")
        return self._numbers[key]

    def head(self) -> LmHead:
        """The teacher's LM head, checked against the spec; ValueError where the cache has none."""
        return self._required(read_head(self.cache, self.spec), HEAD_FILE)

    def sketch_basis(self) -> SketchBasis:
        """The sketch basis, checked against the spec; ValueError where the cache has none."""
        return self._required(read_sketch(self.cache, self.spec), SKETCH_FILE)

    def tail_template(self) -> TailTemplate | None:
        """The tail template, checked against the spec; None where the cache has none."""
        return read_template(self.cache, self.spec)

    def _required(self, asset: _A | None, file: str) -> _A:
        if asset is None:
            raise ValueError(f"{self.cache} has no {file}: {self.spec.records} records need none")
        return asset

    def _shard(self, number: int) -> Shard:
        with self._lock:
            opening = self._opening.setdefault(number, threading.Lock())
        with opening:  # fetching a shard blocks only the threads that want it
            with self._lock:
                shard = self._open.get(number)
            if shard is None:
                shard = open_shard(self.cache, self._plan, self.seal.shards[number])
            with self._lock:
                self._open[number] = shard
                self._open.move_to_end(number)
                if len(self._open) > _MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
        return shard
