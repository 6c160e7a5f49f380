"""Caches from caches: what subset, merge, export and extend have in common.

Promises: what is derived is an ordinary cache, made through the same plan, commits and seal, so
that running a tool again resumes it and two at once cannot harm each other; frames are never
decoded or encoded again; files that can stay as they are are linked or copied unopened, everything
else is checked while it is read; equal inputs give equal bytes. The caches that were given are
never written to. Refuses inputs that are not sealed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from teacher_cache.folder.layout import open_shard, read_assets, require_plan, shard_keys
from teacher_cache.folder.reader import CacheReader
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.manifest import CacheSpec, Plan, Seal, ShardCommit
from teacher_cache.shards.shard import Shard
from teacher_cache.storage.local_store import LocalStore
from teacher_cache.storage.open_store import open_store
from teacher_cache.storage.store import Location, Store


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedCache:
    """A complete cache to derive others from."""

    reader: CacheReader
    store: Store
    plan: Plan
    seal: Seal

    @classmethod
    def open(cls, location: Location) -> "SealedCache":
        """Open by folder or URL; refuses what `CacheReader.open` refuses."""
        reader = CacheReader.open(location)
        plan = require_plan(reader.cache)
        return cls(reader=reader, store=reader.cache, plan=plan, seal=reader.seal)

    @property
    def spec(self) -> CacheSpec:
        """What the cache holds, and of which teacher."""
        return self.seal.spec

    @property
    def assets(self) -> TeacherAssets:
        """What the cache stores once for all of its records; reads the files again each time."""
        return read_assets(self.store, self.spec)

    def kept(self, commit: ShardCommit) -> tuple[tuple[str, int], ...]:
        """(key, position in the source) of every row of a shard, in order."""
        positions = dict(self.plan.shards[commit.index])
        return tuple((key, positions[key]) for key in shard_keys(self.plan, commit))

    def open_shard(self, number: int) -> Shard:
        """One of its shards, for random access."""
        return open_shard(self.store, self.plan, self.seal.shards[number])


def open_apart(out: Location, sources: Iterable[SealedCache]) -> Store:
    """The store to write to; ValueError where it lies inside a cache that is read from."""
    store = open_store(out)
    for source in sources:
        if _place(store).startswith(f"{_place(source.store)}/"):
            raise ValueError(
                f"{store} lies inside {source.store}, which is only read; give a folder of its own"
            )
    return store


def _place(store: Store) -> str:
    return str(store.folder.resolve()) if isinstance(store, LocalStore) else store.url
