"""Builds a small cache with everything that derived caches must keep, and reads its rows as bytes.

As a script (`python -m tests.support.derived TOOL FOLDER`) it kills one tool before, after and
halfway through each of its steps, runs it again, and compares the result with an undisturbed run.
It prints the number of tries and fails by an assertion.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from teacher_cache.derive.export import export_cache
from teacher_cache.derive.merge import merge_caches
from teacher_cache.derive.sealed_cache import SealedCache
from teacher_cache.derive.subset import Selection, subset_cache
from teacher_cache.folder.layout import read_encoded_rows
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.manifest import Seal
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.storage.store import Location
from tests.support.builders import build, published
from tests.support.faults import HEAD, kill_at, points_of
from tests.support.strategies import asked_again, make_cached, make_spec


def shards_from(first: int) -> list[list[CachedSample]]:
    """Three shards; in the first two, rows that share the record of one before them."""
    alone = [make_cached(first + number, "hidden") for number in range(6)]
    again = [asked_again(alone[0], first + number, "hidden") for number in (20, 21, 22)]
    return [
        [alone[0], *again, alone[1]],
        [alone[2], asked_again(alone[2], first + 30, "hidden")],
        alone[3:],
    ]


def base_cache(
    location: Location, first: int = 0, form: ShardFormatName = "arrow", num_shards: int = 3
) -> SealedCache:
    """A sealed cache of up to ten rows; `first` tells its samples from those of others."""
    spec = make_spec("hidden", head_digest=HEAD.digest)
    build(location, shards_from(first)[:num_shards], form, spec, head=HEAD)
    return SealedCache.open(location)


def rows_of(cache: SealedCache) -> list[EncodedRow]:
    """Every row of a cache, in order, as frames."""
    return [
        row
        for commit in cache.seal.shards
        for row in read_encoded_rows(cache.store, cache.plan, commit)
    ]


def content_of(cache: SealedCache) -> list[tuple[object, ...]]:
    """What is in every row, whoever stores it."""
    return [
        (row.key, row.source_id, row.messages, row.images, dict(row.frames))
        for row in rows_of(cache)
    ]


def _subset(folder: Path, out: Path) -> Seal:
    keys = CacheReader.open(folder / "a").keys
    return subset_cache(folder / "a", out, Selection(keys=keys[1:]), samples_per_shard=3)


TOOLS: dict[str, Callable[[Path, Path], Seal]] = {
    "subset": _subset,
    "export": lambda folder, out: export_cache(folder / "a", out, "webdataset"),
    "merge": lambda folder, out: merge_caches(
        [folder / "a", folder / "b", folder / "a"], out, on_duplicate="first"
    ),
}


def kill_everywhere(folder: Path, tool: Callable[[Path, Path], Seal]) -> int:
    """Kill `tool` at each of its steps; returns how many tries there were."""
    points = points_of(tool, folder, folder / "undisturbed")
    wanted = published(folder / "undisturbed")
    for point in points:
        out = folder / f"{point[0]}-{point[1]}"
        kill_at(point, tool, folder, out)
        assert not (out / "SEALED.json").exists() or published(out) == wanted, point
        tool(folder, out)
        assert published(out) == wanted, point
    return len(points)


if __name__ == "__main__":
    place = Path(sys.argv[2])
    base_cache(place / "a", num_shards=2)
    base_cache(place / "b", 100, num_shards=1)
    sys.stdout.write(f"{kill_everywhere(place, TOOLS[sys.argv[1]])}\n")
