"""Removes files that killed or losing attempts left in a sealed cache.

Removes only private files and shard files that emkd named, that the seal does not name, and that
are older than a grace period. A wrong clock can only keep a file too long, or remove one of an
attempt that has already lost. Refuses a cache without a seal: only the seal says which files count.
"""

import re
import time
from dataclasses import dataclass

from teacher_cache.folder.layout import require_same_plan, require_seal
from teacher_cache.storage.open_store import open_store
from teacher_cache.storage.store import Location

_PRIVATE = re.compile(r"((commits|shards)/)?\.[^/]+\.[0-9a-f]{16}\.tmp")
_SHARD = re.compile(r"shards/[0-9]+-[0-9a-f]+\.(arrow|tar)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """A file that readers ignore."""

    file: str
    num_bytes: int
    age_hours: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GarbageReport:
    """Files that were removed (or would be, in a dry run), and files that are too young."""

    removed: tuple[Leftover, ...]
    kept: tuple[Leftover, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the removed files."""
        return sum(leftover.num_bytes for leftover in self.removed)


def collect_garbage(
    location: Location, grace_hours: float = 24.0, dry_run: bool = False
) -> GarbageReport:
    """Remove leftovers that are older than the grace period; a dry run only lists them.

    Raises `IncompleteCacheError` for a cache without a seal, `CacheMismatchError` for one whose
    seal and plan differ.
    """
    if not grace_hours >= 0:  # also refuses NaN
        raise ValueError(f"grace_hours must be >= 0, found {grace_hours}")
    cache = open_store(location)
    seal = require_seal(cache)
    require_same_plan(cache, seal)
    sealed = {file.file for commit in seal.shards for file in commit.files}
    now = time.time()
    removed: list[Leftover] = []
    kept: list[Leftover] = []
    for name in (name for folder in ("", "commits", "shards") for name in cache.names(folder)):
        if name in sealed or not (_PRIVATE.fullmatch(name) or _SHARD.fullmatch(name)):
            continue
        try:
            age_hours = (now - cache.modified(name)) / 3600
        except FileNotFoundError:
            continue  # its owner removed it first
        leftover = Leftover(file=name, num_bytes=cache.size(name) or 0, age_hours=age_hours)
        if age_hours < grace_hours:
            kept.append(leftover)
            continue
        if not dry_run:
            cache.remove(name)
        removed.append(leftover)
    return GarbageReport(removed=tuple(removed), kept=tuple(kept))
