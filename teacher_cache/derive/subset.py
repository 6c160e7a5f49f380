"""Writes a cache of some rows of another: chosen by key, by share, by number of tokens.

Promises: exactly the chosen rows, in the order of the base, with unchanged frames; a vision record
whose owner is not chosen is stored by the first chosen row that shares it. Refuses keys that the
base does not have and choices that leave no row.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby

from teacher_cache.derive.derive import derive, reassign_owners
from teacher_cache.derive.sealed_cache import SealedCache, open_apart
from teacher_cache.folder.layout import read_encoded_rows
from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.shard_plan import shard_of
from teacher_cache.folder.writer import write_encoded_shard
from teacher_cache.schema.manifest import Plan, Seal
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.schema.strict_json import StrictRecord
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.storage.store import Location


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Selection(StrictRecord):
    """Rows that pass every given filter; `fraction` draws a share of the rest."""

    keys: tuple[str, ...] | None = None
    fraction: float | None = None
    seed: int = 0
    min_vision_tokens: int | None = None
    max_vision_tokens: int | None = None
    min_response_tokens: int | None = None
    max_response_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}, expected more than 0, at most 1")

    @property
    def described(self) -> str:
        """The given filters, as flags."""
        asked = dataclasses.asdict(self)
        asked["keys"] = None if self.keys is None else f"({len(self.keys)} keys)"
        asked["seed"] = None if self.fraction is None else self.seed
        flags = [(name.replace("_", "-"), value) for name, value in asked.items()]
        return " ".join(f"--{name} {value}" for name, value in flags if value is not None)

    @property
    def counts_tokens(self) -> bool:
        """Whether rows must be read to choose them."""
        bounds = [value for name, value in dataclasses.asdict(self).items() if "_tokens" in name]
        return any(bound is not None for bound in bounds)

    def admits(self, num_vision: int, num_response: int) -> bool:
        """Whether a row with these numbers of tokens passes."""
        return (
            (self.min_vision_tokens or 0) <= num_vision
            and (self.min_response_tokens or 0) <= num_response
            and (self.max_vision_tokens is None or num_vision <= self.max_vision_tokens)
            and (self.max_response_tokens is None or num_response <= self.max_response_tokens)
        )


def choose(
    reader: CacheReader, selection: Selection, progress: Progress = no_progress
) -> list[int]:
    """Numbers of the chosen rows, ascending; `progress` counts rows.

    ValueError for unknown keys, and if no row is left.
    """
    chosen = list(range(len(reader)))
    if selection.keys is not None:
        wanted = set(selection.keys)
        unknown = sorted(wanted - set(reader.keys))
        if unknown:
            raise ValueError(
                f"{reader.cache} has no samples {', '.join(unknown[:5])} ({len(unknown)} of "
                f"{len(wanted)} keys); give keys that emkd inspect shows"
            )
        chosen = [index for index in chosen if reader.keys[index] in wanted]
    if selection.counts_tokens:
        chosen = [index for index in chosen if _admitted(reader, index, selection, progress)]
    if selection.fraction is not None:
        count = round(selection.fraction * len(chosen))
        chosen = sorted(random.Random(selection.seed).sample(chosen, count))
    if not chosen:
        raise ValueError(
            f"{reader.cache}: none of {len(reader)} samples passes {selection.described}; choose "
            "wider bounds (emkd inspect shows the counts of the cache)"
        )
    return chosen


def _admitted(reader: CacheReader, index: int, selection: Selection, progress: Progress) -> bool:
    output = reader.read(index, ()).output
    progress("choose", index + 1, len(reader))
    num_vision = sum(view.num_tokens for view in output.views)
    return selection.admits(num_vision, int(output.is_response.sum()))


def subset_cache(
    location: Location,
    out: Location,
    selection: Selection,
    *,
    form: ShardFormatName | None = None,
    samples_per_shard: int | None = None,
    progress: Progress = no_progress,
) -> Seal:
    """Write the chosen rows of a sealed cache as a new cache.

    Format and size of the shards default to those of the base.
    """
    if samples_per_shard is not None and samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}, expected at least 1")
    base = SealedCache.open(location)
    chosen = choose(base.reader, selection, progress)
    size = samples_per_shard or max(base.reader.shard_sizes)
    parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    positions = [place for commit in base.seal.shards for place in base.kept(commit)]
    plan = Plan(
        spec=base.spec,
        format=form or base.seal.format,
        source=f"{len(chosen)} samples of {base.seal.fingerprint[:12]} ({base.seal.source})",
        shards=tuple(tuple(positions[index] for index in part) for part in parts),
    )
    store = open_apart(out, [base])
    return derive(
        store,
        plan,
        lambda index: write_encoded_shard(
            store, plan, index, reassign_owners(rows_at(base, parts[index]))
        ),
        base.assets,
        progress,
    )


def rows_at(base: SealedCache, rows: Sequence[int]) -> Iterator[EncodedRow]:
    """Rows of a cache by number, ascending; every byte has been checked."""
    starts = [0, *accumulate(base.reader.shard_sizes)]
    for number, members in groupby(rows, lambda row: shard_of(starts, row)):
        places = (row - starts[number] for row in members)
        yield from read_encoded_rows(base.store, base.plan, base.seal.shards[number], places)
