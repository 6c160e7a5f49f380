"""Opens the sealed caches that others are derived from."""

from collections.abc import Iterable
from dataclasses import dataclass

from teacher_cache.folder.layout import read_assets, require_plan, shard_keys
from teacher_cache.folder.reader import CacheReader
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.manifest import CacheSpec, Plan, Seal, ShardCommit
from teacher_cache.storage.local_store import LocalStore
from teacher_cache.storage.open_store import open_store
from teacher_cache.storage.store import Location, Store


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedCache:
    """A sealed cache with its reader, plan and seal."""

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
        """The settings of the records, and the identity of the teacher."""
        return self.seal.spec

    @property
    def assets(self) -> TeacherAssets:
        """The assets; reads their files at each call."""
        return read_assets(self.store, self.spec)

    def kept(self, commit: ShardCommit) -> tuple[tuple[str, int], ...]:
        """(key, position in the source) of each row of a shard, in order."""
        positions = dict(self.plan.shards[commit.index])
        return tuple((key, positions[key]) for key in shard_keys(self.plan, commit))


def open_apart(out: Location, sources: Iterable[SealedCache]) -> Store:
    """The store to write to; ValueError if it lies inside an input cache."""
    store = open_store(out)
    for source in sources:
        if _place(store).startswith(f"{_place(source.store)}/"):
            raise ValueError(
                f"{store} lies inside the input {source.store}; give a folder outside of it"
            )
    return store


def _place(store: Store) -> str:
    return str(store.folder.resolve()) if isinstance(store, LocalStore) else store.url
