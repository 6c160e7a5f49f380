"""Writes a new cache from the rows of sealed ones: the steps that all tools of this room share.

A derived cache is an ordinary cache with plan, commits and seal, so running a tool again resumes
it, and two at once cannot harm each other. Frames are never decoded. Unchanged files are linked or
copied unopened; all other bytes are checked while they are read. Equal inputs give equal bytes.
Input caches are never written to.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from teacher_cache.derive.sealed_cache import SealedCache
from teacher_cache.folder.layout import REMEDY, committed, shard_name
from teacher_cache.folder.writer import publish_rows, seal_cache, write_assets, write_plan
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.schema.manifest import Plan, Seal, ShardFile
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.shards.formats import shard_format
from teacher_cache.storage.durable_files import sha256_file
from teacher_cache.storage.store import Store


def begin(out: Store, plan: Plan, assets: TeacherAssets) -> None:
    """Write plan and assets; `CacheMismatchError` if `out` has another plan."""
    out.require_writable()
    write_plan(out, plan)
    write_assets(out, assets)


def derive(
    out: Store,
    plan: Plan,
    make: Callable[[int], object],
    assets: TeacherAssets,
    progress: Progress = no_progress,
) -> Seal:
    """Write plan and assets, call `make` for every shard that is not committed, and seal.

    `make(index)` commits shard `index`. Raises `CacheMismatchError` if `out` has another plan.
    """
    begin(out, plan, assets)
    done = committed(out)
    for index in range(len(plan.shards)):
        if index not in done:
            make(index)
        progress("shards", index + 1, len(plan.shards))
    return seal_cache(out)


def adopt_file(
    source: SealedCache, file: ShardFile, out: Store, plan: Plan, index: int
) -> ShardFile:
    """Make a file of another cache a file of shard `index` of `out`.

    A file of the plan's format is not opened: it becomes a hard link on one disk, a copy by the
    server in one object store, else a copy. A file of the other format is written anew with the
    same frames, metadata and rows, after checking every byte. Raises `ShardCorruptError`.
    """
    if source.seal.format != plan.format:
        return _translate(source, file, out, plan, index)
    name = shard_name(index, file.sha256, plan.format)
    out.copy_from(source.store, file.file, name)
    return dataclasses.replace(file, file=name)


def _translate(
    source: SealedCache, file: ShardFile, out: Store, plan: Plan, index: int
) -> ShardFile:
    path = source.store.local(file.file, file.num_bytes, file.sha256)
    if sha256_file(path) != file.sha256:
        raise ShardCorruptError(f"{path} is not the file that was committed; {REMEDY}")
    shard = shard_format(source.plan.format).open(path)
    rows = (shard.read(row, file.columns) for row in range(shard.num_rows))
    name, num_bytes, sha256 = publish_rows(
        out, plan, index, rows, shard.keys, file.columns, shard.metadata
    )
    return dataclasses.replace(file, file=name, num_bytes=num_bytes, sha256=sha256)


def reassign_owners(rows: Iterable[EncodedRow]) -> Iterator[EncodedRow]:
    """Pass on the rows of a new shard; a row whose owner is missing gets a new owner.

    The first row that shared the missing owner's images and vision record becomes their owner, and
    the others share from it.
    """
    here: set[str] = set()
    new_owners: dict[str, str] = {}
    for row in rows:
        owner = row.shared_from
        if owner is None:
            here.add(row.key)
        elif owner not in here:
            new_owner = new_owners.setdefault(owner, row.key)
            row = dataclasses.replace(row, shared_from=None if new_owner == row.key else new_owner)
        yield row
