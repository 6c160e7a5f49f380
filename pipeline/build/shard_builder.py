"""Builds a planned cache shard by shard: what builds and extensions have in common."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol, runtime_checkable

from teacher_cache.folder.layout import committed, require_plan
from teacher_cache.folder.writer import seal_cache
from teacher_cache.schema.manifest import Plan, Seal, ShardCommit
from teacher_cache.schema.progress import Progress
from teacher_cache.storage.store import Store


@runtime_checkable
class ShardBuilder(Protocol):
    """Writes a cache shard by shard: a build, or one of the two kinds of extension."""

    progress: Progress

    def prepare(self, unreadable: Sequence[int] = (), crashing: Sequence[int] = ()) -> Plan:
        """Write the plan, or check that the existing plan matches the settings.

        `unreadable` are positions in the source whose reading crashes a worker, `crashing` those
        on which the teacher does.
        """
        ...

    def build_shard(self, index: int, crashing: Sequence[int] = ()) -> ShardCommit:
        """Write and commit a shard of the plan; `crashing`: positions that crash their worker."""
        ...


class SearchableBuilder(ShardBuilder, Protocol):
    """A builder whose samples can be tried apart, to find those that crash their worker."""

    def num_to_read(self) -> int:
        """How many samples of the source planning reads."""
        ...

    def read_only(self, positions: Sequence[int]) -> None:
        """Read these samples of the source and keep nothing."""
        ...

    def calibration_order(self, unreadable: Sequence[int]) -> tuple[list[int], int | None]:
        """Positions in the order in which planning runs over samples; the tokens that it takes."""
        ...

    def run_over(self, positions: Sequence[int]) -> int:
        """Load the teacher, run it over these samples and keep nothing; returns their tokens."""
        ...

    def probe(self, index: int, start: int, stop: int) -> None:
        """Run the teacher over samples start ... stop - 1 of a shard and keep nothing."""
        ...


def missing_shards(cache: Store) -> list[int]:
    """Indices of the planned shards that are not committed yet."""
    done = committed(cache)
    return [index for index in range(len(require_plan(cache).shards)) if index not in done]


def build_all(builder: ShardBuilder, cache: Store) -> Seal:
    """Plan, build every missing shard, one after the other, and seal; progress counts samples."""
    progress, plan = builder.progress, builder.prepare()
    missing = missing_shards(cache)
    done = plan.num_samples - sum(len(plan.shards[index]) for index in missing)
    for index in missing:
        builder.progress = partial(_in_all, progress, done, plan.num_samples)
        builder.build_shard(index)
        done += len(plan.shards[index])
    return seal_cache(cache)


def _in_all(progress: Progress, before: int, total: int, _what: str, done: int, _: int) -> None:
    progress("samples", before + done, total)
