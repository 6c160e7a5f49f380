"""Builds small caches, and reads and damages their files."""

import hashlib
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from teacher_cache.folder.writer import committed, seal_cache, write_assets, write_plan, write_shard
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import SketchBasis
from teacher_cache.records.tail_template import TailTemplate
from teacher_cache.schema.manifest import CacheSpec, Plan, Seal
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.storage.open_store import open_store
from teacher_cache.storage.store import Location
from tests.support.strategies import make_cached, make_plan

NUM_SHARDS, ROWS_PER_SHARD = 3, 2


def make_shards(num_shards: int = NUM_SHARDS) -> list[list[CachedSample]]:
    """The rows of a small cache, shard by shard."""
    starts = range(0, num_shards * ROWS_PER_SHARD, ROWS_PER_SHARD)
    return [[make_cached(start + row) for row in range(ROWS_PER_SHARD)] for start in starts]


def build(
    location: Location,
    shards: Sequence[Sequence[CachedSample]],
    form: ShardFormatName = "arrow",
    spec: CacheSpec | None = None,
    head: LmHead | None = None,
    sketch: SketchBasis | None = None,
    template: TailTemplate | None = None,
) -> Seal:
    """Do the steps of a build with given rows: plan, assets, missing shards, seal."""
    cache = open_store(location)
    plan: Plan = write_plan(cache, make_plan(shards, spec, form))
    write_assets(cache, TeacherAssets(head=head, sketch=sketch, template=template))
    for index, rows in enumerate(shards):
        if index not in committed(cache):
            write_shard(cache, plan, index, rows, [], 0.0)
    return seal_cache(cache)


def published(cache: Path) -> dict[str, bytes]:
    """Every file of a cache that has a public name, with its bytes."""
    files = [file for file in sorted(cache.rglob("*")) if file.is_file()]
    return {
        str(file.relative_to(cache)): file.read_bytes()
        for file in files
        if not file.name.startswith(".")
    }


def edit_record(file: Path, old: str, new: str, count: int = -1) -> None:
    """Change the text of a plan, commit record or seal, and recompute its check.

    So the reader finds records that disagree, not a damaged byte.
    """
    first, fields = file.read_text().split("\n", 2)[1:]
    assert '"check"' in first
    assert old in fields
    changed = fields.replace(old, new, count)
    digest = hashlib.sha256(changed.encode()).hexdigest()
    file.write_text(f'{{\n "check": "{digest}",\n{changed}')


def flip(file: Path, piece: bytes | None = None) -> None:
    """Flip a bit in the middle of a file, or in the middle of where it has `piece`."""
    data = bytearray(file.read_bytes())
    start, size = (0, len(data)) if piece is None else (data.index(piece), len(piece))
    data[start + size // 2] ^= 1
    file.write_bytes(data)


def forked(work: Callable[..., object], *arguments: object) -> int:
    """Run `work(*arguments)` in a child process and return the child's id."""
    child = os.fork()
    if not child:
        try:
            work(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def exit_status(child: int) -> int:
    return os.waitpid(child, 0)[1]
