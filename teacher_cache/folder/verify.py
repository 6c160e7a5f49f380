"""Reads a whole cache and lists everything that is wrong with it.

Checks, shard by shard: existence and size, SHA-256 of the file, metadata, keys against the plan,
images and messages against the key, checksum, shape and finiteness of every column, and what
docs/format.md promises of the numbers; then the counts of the commit record and the assets. The
report lists every problem. A cache that passes can be read, because the checks are the reader's.
Refuses a cache that is not sealed.
"""

import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from torch import Tensor

from teacher_cache.codec.columns import columns_of
from teacher_cache.codec.number_checks import (
    broken_forms,
    broken_promises,
    broken_shares,
    same_text,
)
from teacher_cache.folder.layout import (
    HEAD_FILE,
    REMEDY,
    SKETCH_FILE,
    TEMPLATE_FILE,
    commit_name,
    open_files,
    read_assets,
    read_commit,
    require_same_plan,
    require_seal,
    require_shard_file,
    shard_keys,
)
from teacher_cache.folder.row_counts import count_row, counts_differ
from teacher_cache.schema.errors import ShardCorruptError, printable
from teacher_cache.schema.manifest import CacheSpec, Plan, Seal, ShardCommit
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.schema.regular_file import require_readable
from teacher_cache.schema.samples import IMAGE_PLACEHOLDER
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.shards.rows import from_columns, require_key, stored_columns, tier_parts
from teacher_cache.storage.durable_files import sha256_file
from teacher_cache.storage.open_store import open_store
from teacher_cache.storage.store import Location, Store

BROKEN_PROMISE = "docs/format.md promises otherwise: no teacher wrote this, build the cache again"
NUM_THREADS = 8
"""Shards checked at a time, at most; that many shards of a remote cache are on this disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """How much was checked, and the problems found; an intact cache has none."""

    shards: int
    samples: int
    problems: tuple[str, ...]


def verify_cache(
    location: Location, progress: Progress = no_progress, num_threads: int | None = None
) -> VerifyReport:
    """Check every byte of a sealed cache; `progress` counts samples.

    Each of `num_threads` threads checks one shard at a time; default: `NUM_THREADS`, at most the
    number of CPUs. The report is in the order of the shards for any number of threads.
    Raises `IncompleteCacheError` for a cache without a seal, `CacheMismatchError` where seal and
    plan are of different caches, and PermissionError for a file that may not be read; every other
    finding is in the report.
    """
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}, expected at least 1")
    cache = open_store(location)
    seal = require_seal(cache)
    plan = require_same_plan(cache, seal)
    lock, done = threading.Lock(), count(1)

    def check(commit: ShardCommit) -> list[str]:
        problems: list[str] = []
        for problem in _shard_problems(cache, plan, commit):
            if problem is not None:
                problems.append(problem)
            else:
                with lock:
                    progress("verify", next(done), seal.num_samples)
        return problems

    # Fetching, hashing and decompression release the interpreter lock.
    with ThreadPoolExecutor(num_threads or min(NUM_THREADS, os.cpu_count() or 1)) as pool:
        problems = list(chain.from_iterable(pool.map(check, seal.shards)))
    problems += _asset_problems(cache, seal)
    return VerifyReport(shards=len(seal.shards), samples=seal.num_samples, problems=tuple(problems))


def _shard_problems(cache: Store, plan: Plan, commit: ShardCommit) -> Iterator[str | None]:
    """The problems of a shard, and None for each of its rows, read or lost."""
    num_seen = 0
    with ExitStack() as stack:
        paths: list[Path] = []
        for file in commit.files:
            try:
                require_shard_file(cache, file)
                path = stack.enter_context(cache.fetched(file.file))
                require_readable(path)
                sha256 = sha256_file(path)
            except PermissionError:
                raise  # nobody knows whether it is damaged
            except (ShardCorruptError, OSError) as error:
                yield str(error)
                continue
            paths.append(path)
            if sha256 != file.sha256:
                yield (
                    f"{cache.where(file.file)}: SHA-256 is {sha256}, {file.sha256} was committed; "
                    f"{REMEDY}"
                )
        if len(paths) == len(commit.files):
            for problem in _row_problems(plan, commit, paths):
                num_seen += problem is None
                yield problem
    yield from [None] * (commit.num_rows - num_seen)
    try:
        if read_commit(cache, commit.index) != commit:
            yield f"{cache.where(commit_name(commit.index))} is not the record that was sealed"
    except ValueError as error:
        yield str(error)


def _row_problems(plan: Plan, commit: ShardCommit, paths: Sequence[Path]) -> Iterator[str | None]:
    try:
        shard = open_files(plan, commit, paths)
    except ShardCorruptError as error:
        yield str(error)
        return
    counts, spec = Counter[str](), plan.spec
    names = columns_of(tier_parts(spec), spec)
    num_intact = 0
    for number, key in enumerate(shard_keys(plan, commit)):
        try:
            row = shard.read(number, names)
            require_key(row, number, key)
            columns = stored_columns(row)
            problems = broken_forms(columns, spec)
            if not problems:
                cached = from_columns(row, columns, spec)
                count_row(cached.output, cached.output.shared_from, counts)
                num_intact += 1
                problems = _broken_promises(cached, columns, spec)
            who = f"{shard.path}: sample {key} ({printable(row.source_id)})"
            yield from (f"{who}: {problem}; {BROKEN_PROMISE}" for problem in problems)
        except ShardCorruptError as error:
            found = str(error)
            yield found if str(shard.path) in found else f"{shard.path}: {found}"
        yield None
    if num_intact == commit.num_rows and (wrong := counts_differ(commit, counts)):
        yield f"{shard.path}: the commit record counts {wrong}; {REMEDY}"


def _broken_promises(
    cached: CachedSample, columns: Mapping[str, Tensor], spec: CacheSpec
) -> Iterator[str]:
    """What of an intact row is not what a teacher can have said of its sample."""
    sample, output = cached.sample, cached.output
    yield from broken_promises(columns, output, spec)
    if any(view.image >= len(sample.images) for view in output.views):
        yield f"views name more images than the {len(sample.images)} that it has"
    text = " ".join(message.text for message in sample.messages)
    ids = output.content_ids.tolist()
    if not same_text(ids, text.replace(IMAGE_PLACEHOLDER, " ")):
        yield f"content_ids has {ids[0]} alone, {len(ids)} times; its text does not repeat"


def _asset_problems(cache: Store, seal: Seal) -> Iterator[str]:
    spec = seal.spec
    try:
        assets = read_assets(cache, spec)
    except ShardCorruptError as error:
        yield str(error)
        return
    width, rank = spec.hidden_size, spec.sketch_rank
    shapes = {
        "weight": [spec.vocab_size, width],
        "bias": [spec.vocab_size],
        "hidden_mean": [width],
        "projection": [width, rank],
        "mean_logits": [spec.vocab_size],
        "directions": [spec.vocab_size, rank],
        "vision": [spec.vocab_size],
        "response": [spec.vocab_size],
    }
    files = ((HEAD_FILE, assets.head), (SKETCH_FILE, assets.sketch))
    for file, asset in (*files, (TEMPLATE_FILE, assets.template)):
        for name, values in ({} if asset is None else asset.tensors()).items():
            problem = None
            if list(values.shape) != shapes[name]:
                problem = f"has shape {list(values.shape)}, promised is {shapes[name]}"
            elif not bool(values.isfinite().all()):
                problem = "holds NaN or infinite numbers"
            elif file == TEMPLATE_FILE:
                problem = broken_shares(values)
            if problem is not None:
                yield f"{cache.where(file)}: {name} {problem}; {BROKEN_PROMISE}"
