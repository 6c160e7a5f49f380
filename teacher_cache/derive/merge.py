"""Merges caches: the shards of each input in turn, unchanged.

Files of the same format are linked or copied unopened; others are translated frame by frame.
Refuses caches of different specs, with a table of the fields. Refuses samples that are in several
caches, or keeps the first of each: shards with later ones are then written anew without them.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from teacher_cache.derive.derive import adopt_file, derive, reassign_owners
from teacher_cache.derive.sealed_cache import SealedCache, open_apart
from teacher_cache.folder.layout import read_encoded_rows
from teacher_cache.folder.writer import commit_shard, write_encoded_shard
from teacher_cache.schema.manifest import Plan, Seal, ShardCommit, require_equal
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.storage.store import Location, Store

OnDuplicate = Literal["refuse", "first"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _InputShard:
    """A shard of one input, and the keys and positions of the rows that are kept."""

    cache: SealedCache
    commit: ShardCommit
    kept: tuple[tuple[str, int], ...]


def merge_caches(
    locations: Sequence[Location],
    out: Location,
    *,
    on_duplicate: OnDuplicate = "refuse",
    form: ShardFormatName | None = None,
    progress: Progress = no_progress,
) -> Seal:
    """Merge sealed caches of one spec; the default format is that of the first.

    Raises `CacheMismatchError` for different specs, ValueError for repeated samples.
    """
    if len(locations) < 2:
        raise ValueError(f"found {len(locations)} caches to merge, expected at least two")
    caches = [SealedCache.open(location) for location in locations]
    first = caches[0]
    for cache in caches[1:]:
        what = f"{cache.store} cannot be merged with {first.store}: its spec"
        require_equal(cache.spec, first.spec, what, "Only caches of one teacher and one recipe.")
    shards = _input_shards(caches, on_duplicate)
    plan = Plan(
        spec=first.spec,
        format=form or first.seal.format,
        source=" + ".join(cache.seal.source for cache in caches),
        shards=tuple(part.kept for part in shards),
        rejected=tuple(rejected for cache in caches for rejected in cache.seal.rejected),
    )
    store = open_apart(out, caches)
    return derive(
        store,
        plan,
        lambda index: adopt_shard(store, plan, index, shards[index].cache, shards[index].commit),
        first.assets,
        progress,
    )


def adopt_shard(
    out: Store, plan: Plan, index: int, cache: SealedCache, commit: ShardCommit
) -> ShardCommit:
    """Make a shard of another cache, or those of its rows that are planned, shard `index`."""
    keys = {key for key, _ in plan.shards[index]}
    if len(keys) < commit.num_rows:
        rows = (
            row for row in read_encoded_rows(cache.store, cache.plan, commit) if row.key in keys
        )
        return write_encoded_shard(out, plan, index, reassign_owners(rows), seconds=commit.seconds)
    files = tuple(adopt_file(cache, file, out, plan, index) for file in commit.files)
    whole = dataclasses.replace(commit, index=index, files=files, rejected=())
    return commit_shard(out, plan, whole)


def _input_shards(caches: Sequence[SealedCache], on_duplicate: OnDuplicate) -> list[_InputShard]:
    """The shards of all caches in turn, without rows that an earlier cache has."""
    seen: set[str] = set()
    repeated: list[str] = []
    shards: list[_InputShard] = []
    for cache in caches:
        for commit in cache.seal.shards:
            rows = cache.kept(commit)
            repeated += [key for key, _ in rows if key in seen]
            kept = tuple(place for place in rows if place[0] not in seen)
            if kept:
                shards.append(_InputShard(cache=cache, commit=commit, kept=kept))
        seen.update(cache.reader.keys)
    if repeated and on_duplicate == "refuse":
        more = f" and {len(repeated) - 10} more" if len(repeated) > 10 else ""
        raise ValueError(
            f"{len(repeated)} samples are in several of the caches: "
            f"{', '.join(sorted(repeated)[:10])}{more}; keep the first of each with --on-duplicate "
            "first, or remove them with emkd subset"
        )
    return shards
