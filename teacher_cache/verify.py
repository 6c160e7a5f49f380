"""Reads a whole cache and lists everything that is wrong with it.

Checks, shard by shard: presence and size, SHA-256 of the whole file, identity, keys against the
plan, every image and message against its key, every plane's checksum, shape and finiteness; then
the assets. A problem does not stop the search: the report names each one. Uses the reader's own
functions, so that what passes here can be read. Refuses a cache that is not sealed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from teacher_cache.folder import (
    REMEDY,
    open_shard,
    read_commit,
    read_head,
    read_sketch,
    require_same_plan,
    require_seal,
    require_shard_file,
    shard_keys,
)
from teacher_cache.manifest import Plan, Seal, ShardCommit, ShardCorruptError
from teacher_cache.rows import read_sample, tier_parts
from teacher_cache.storage import Location, Store, open_store, sha256_file


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was looked at and what is wrong with it; a sound cache has no problems."""

    shards: int
    samples: int
    problems: tuple[str, ...]


def verify_cache(
    location: Location, progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Check every byte of a sealed cache; `progress` is called with (samples done, in all).

    Raises `IncompleteCacheError` for a cache without a seal and `CacheMismatchError` where seal
    and plan are of different caches; every other finding is in the report.
    """
    cache = open_store(location)
    seal = require_seal(cache)
    plan = require_same_plan(cache, seal)
    problems: list[str] = []
    done = 0
    for commit in seal.shards:
        problems += _file_problems(cache, seal, commit)
        for problem in _row_problems(cache, plan, commit):
            problems += [] if problem is None else [problem]
            done += 1
            if progress is not None:
                progress(done, seal.num_samples)
    problems += _asset_problems(cache, seal)
    once = tuple(dict.fromkeys(problems))  # a missing shard is met twice
    return VerifyReport(shards=len(seal.shards), samples=done, problems=once)


def _file_problems(cache: Store, seal: Seal, commit: ShardCommit) -> Iterator[str]:
    """The shard as a file: presence, size, checksum, and its commit record against the seal."""
    try:
        require_shard_file(cache, commit)
        with cache.fetched(commit.file) as path:
            sha256 = sha256_file(path)
        if sha256 != commit.sha256:
            yield (
                f"{cache.where(commit.file)}: SHA-256 is {sha256}, {commit.sha256} was committed; "
                f"{REMEDY}"
            )
    except (ShardCorruptError, OSError) as error:
        yield str(error)
    try:
        if read_commit(cache, commit.index) != seal.shards[commit.index]:
            yield f"{cache}: the commit record of shard {commit.index} is not the sealed one"
    except ValueError as error:
        yield str(error)


def _row_problems(cache: Store, plan: Plan, commit: ShardCommit) -> Iterator[str | None]:
    """One entry for each row of the shard: what is wrong with it, or None."""
    keys = shard_keys(plan, commit)
    try:
        shard = open_shard(cache, plan, commit)
    except ShardCorruptError as error:
        yield from [str(error), *[None] * (len(keys) - 1)]
        return
    for row, key in enumerate(keys):
        try:
            read_sample(shard, row, key, tier_parts(plan.spec), plan.spec)
            yield None
        except ShardCorruptError as error:
            yield str(error)


def _asset_problems(cache: Store, seal: Seal) -> Iterator[str]:
    try:
        if seal.spec.head_digest is not None:
            read_head(cache, seal.spec)
        if seal.spec.sketch_digest is not None:
            read_sketch(cache, seal.spec)
    except ShardCorruptError as error:
        yield str(error)
