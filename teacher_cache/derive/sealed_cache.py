"""Caches from caches: what subset, merge, export and extend have in common.

Promises: what is derived is an ordinary cache, made through the same plan, commits and seal, so
that running a tool again resumes it and two at once cannot harm each other; frames are never
decoded or encoded again; files that can stay as they are are linked or copied unopened, everything
else is checked while it is read; equal inputs give equal bytes. The caches that were given are
never written to. Refuses inputs that are not sealed.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from teacher_cache.folder.layout import (
    REMEDY,
    committed,
    open_shard,
    read_head,
    read_sketch,
    read_template,
    require_plan,
    shard_keys,
    shard_name,
)
from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.writer import seal_cache, write_assets, write_plan
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import SketchBasis
from teacher_cache.records.tail_template import TailTemplate
from teacher_cache.schema.manifest import (
    CacheSpec,
    Plan,
    Seal,
    ShardCommit,
    ShardCorruptError,
    ShardFile,
)
from teacher_cache.shards.shard import EncodedRow, Shard, shard_format
from teacher_cache.storage.store import LocalStore, Location, Store, open_store, sha256_file

Progress = Callable[[int, int], None]
"""Called with (shards that are there, shards in all)."""


def no_progress(_done: int, _total: int) -> None:
    """Report nothing."""


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
    def head(self) -> LmHead | None:
        """The LM head, where the records need it."""
        return None if self.spec.head_digest is None else read_head(self.store, self.spec)

    @property
    def sketch(self) -> SketchBasis | None:
        """The basis of the sketch, where there is one."""
        return None if self.spec.sketch_digest is None else read_sketch(self.store, self.spec)

    @property
    def template(self) -> TailTemplate | None:
        """The template of the tails, where there is one."""
        return None if self.spec.template_digest is None else read_template(self.store, self.spec)

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


def begin(
    out: Store,
    plan: Plan,
    *,
    head: LmHead | None,
    sketch: SketchBasis | None,
    template: TailTemplate | None = None,
) -> None:
    """Write plan and assets; `CacheMismatchError` where `out` was begun with another plan."""
    out.require_writable()
    write_plan(out, plan)
    write_assets(out, head=head, sketch=sketch, template=template)


def derive(
    out: Store,
    plan: Plan,
    make: Callable[[int], object],
    *,
    head: LmHead | None,
    sketch: SketchBasis | None,
    template: TailTemplate | None = None,
    progress: Progress = no_progress,
) -> Seal:
    """Write plan and assets, `make` every shard that is not committed yet, and seal.

    `make` is given a shard number and commits that shard. Raises `CacheMismatchError` where `out`
    was begun with another plan.
    """
    begin(out, plan, head=head, sketch=sketch, template=template)
    done = committed(out)
    for index in range(len(plan.shards)):
        if index not in done:
            make(index)
        progress(index + 1, len(plan.shards))
    return seal_cache(out)


def take_file(
    source: SealedCache, file: ShardFile, out: Store, plan: Plan, index: int
) -> ShardFile:
    """Give a file of another cache to shard `index` of `out`.

    Unopened where the format is the plan's: as a second name on one disk, as a copy by the server
    in one object store, else as a copy. In the other format: the same frames, metadata and rows,
    and every byte that is read is checked. Raises `ShardCorruptError`.
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
    rows = (shard.read(row, file.planes) for row in range(shard.num_rows))
    target = shard_format(plan.format)
    with out.attempt(f"shards/{index:05d}{target.suffix}") as attempt:
        target.write(attempt, rows, file.planes, shard.metadata)
        written = target.open(attempt)
        found = [written.read(row, file.planes).key for row in range(written.num_rows)]
        if found != list(shard.keys):
            raise ShardCorruptError(f"{attempt}: what was written does not read back")
        sha256 = sha256_file(attempt)
        name = shard_name(index, sha256, plan.format)
        translated = dataclasses.replace(
            file, file=name, num_bytes=attempt.stat().st_size, sha256=sha256
        )
        out.publish(attempt, name)
    return translated


def rehomed(rows: Iterable[EncodedRow]) -> Iterator[EncodedRow]:
    """Rows of one new shard whose owners may have stayed behind.

    Where the row that stored the shared images and vision record is not among them, the first of
    those that shared it stores them, and the others share from that one.
    """
    here: set[str] = set()
    heirs: dict[str, str] = {}
    for row in rows:
        owner = row.shared_from
        if owner is None:
            here.add(row.key)
        elif owner not in here:
            heir = heirs.setdefault(owner, row.key)
            row = dataclasses.replace(row, shared_from=None if heir == row.key else heir)
        yield row
