"""Writes a cache in the other shard format: the same rows, layers, keys, order and identity.

Frames and metadata are unchanged, so exporting back gives the bytes of the original files.
"""

import dataclasses

from teacher_cache.derive.derive import adopt_file, derive
from teacher_cache.derive.sealed_cache import SealedCache, open_apart
from teacher_cache.folder.writer import commit_shard
from teacher_cache.schema.manifest import Seal
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.storage.store import Location


def export_cache(
    location: Location, out: Location, form: ShardFormatName, progress: Progress = no_progress
) -> Seal:
    """Write a sealed cache in a format; files that have this format are copied."""
    base = SealedCache.open(location)
    store = open_apart(out, [base])
    plan = dataclasses.replace(base.plan, format=form)

    def make(index: int) -> None:
        commit = base.seal.shards[index]
        files = tuple(adopt_file(base, file, store, plan, index) for file in commit.files)
        commit_shard(store, plan, dataclasses.replace(commit, files=files))

    return derive(store, plan, make, base.assets, progress)
