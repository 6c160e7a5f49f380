"""What lies where in a cache folder, and how each piece is read; nothing here writes.

    plan.json, SEALED.json              see manifest.py
    commits/<k>.json                    the record that makes shard k exist
    shards/<k>-<sha256>.<arrow|tar>     named by content: equal attempts meet, others never clash
    head.safetensors, sketch.safetensors    the assets, checked against their digests in the spec

Names that begin with a dot are private files of a running or a killed build and mean nothing.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from teacher_cache.decode import DecodeError, decode_json
from teacher_cache.head import LmHead
from teacher_cache.manifest import (
    CacheSpec,
    IncompleteCacheError,
    Plan,
    Seal,
    ShardCommit,
    ShardCorruptError,
    require_equal,
    to_json,
)
from teacher_cache.shard_format import Shard, shard_format
from teacher_cache.sketch import SketchBasis
from teacher_cache.storage import Store

PLAN_FILE = "plan.json"
SEAL_FILE = "SEALED.json"
HEAD_FILE = "head.safetensors"
SKETCH_FILE = "sketch.safetensors"

REMEDY = "delete SEALED.json and this shard's commits/*.json, and run the same emkd build again"
"""What heals a damaged shard: every other shard stays."""
_ASSET_REMEDY = "delete SEALED.json, build.json and this file, and run the same emkd build again"

_NUM_REQUESTS = 8
"""Files that are asked for at a time; object stores take their time for each."""

A = TypeVar("A", LmHead, SketchBasis)
R = TypeVar("R", Plan, Seal, ShardCommit)


def read_plan(cache: Store) -> Plan | None:
    """The plan; None where there is none yet."""
    return _read(cache, PLAN_FILE, Plan)


def read_seal(cache: Store) -> Seal | None:
    """The seal; None while the cache is not complete."""
    return _read(cache, SEAL_FILE, Seal)


def require_plan(cache: Store) -> Plan:
    """The plan; `IncompleteCacheError` where there is none."""
    plan = read_plan(cache)
    if plan is None:
        raise IncompleteCacheError(
            f"{cache} is not a cache: it has no {PLAN_FILE}; give the folder that emkd build wrote"
        )
    return plan


def require_seal(cache: Store) -> Seal:
    """The seal; `IncompleteCacheError` with how far the build is and the remedy."""
    seal = read_seal(cache)
    if seal is not None:
        return seal
    num_shards, num_committed = len(require_plan(cache).shards), len(committed(cache))
    raise IncompleteCacheError(
        f"{cache}: {num_committed} of {num_shards} shards are committed and the cache is not "
        "sealed; run the same emkd build again, it does the rest"
    )


def require_same_plan(cache: Store, seal: Seal) -> Plan:
    """The plan that was sealed; `CacheMismatchError` where plan and seal are of two caches."""
    plan = require_plan(cache)
    remedy = "The folder is damaged or a mixture of two caches: build it again."
    require_equal(seal.spec, plan.spec, f"{cache}: the seal's spec", remedy)
    require_equal(seal.format, plan.format, f"{cache}: the seal's format", remedy)
    require_equal(seal.fingerprint, plan.fingerprint, f"{cache}: the seal's plan", remedy)
    sealed = [(commit.index, commit.num_rows) for commit in seal.shards]
    numbers = range(len(plan.shards))
    if [index for index, _ in sealed] == list(numbers):
        planned = [(index, len(shard_keys(plan, seal.shards[index]))) for index in numbers]
    else:
        planned = [(index, len(plan.shards[index])) for index in numbers]
    require_equal(sealed, planned, f"{cache}: shards and rows of the seal", remedy)
    return plan


def read_commit(cache: Store, index: int) -> ShardCommit | None:
    """The record of shard `index`; None while it is not committed."""
    name = commit_name(index)
    commit = _read(cache, name, ShardCommit)
    if commit is not None and commit.index != index:
        raise DecodeError(f"{cache.where(name)} holds the record of shard {commit.index}")
    return commit


def committed(cache: Store) -> dict[int, ShardCommit]:
    """The records of all committed shards by shard number."""
    names = [re.fullmatch(r"commits/([0-9]{5,})\.json", name) for name in cache.names("commits")]
    with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        numbers = sorted(int(match[1]) for match in names if match)
        commits = pool.map(lambda index: read_commit(cache, index), numbers)
        return {commit.index: commit for commit in commits if commit is not None}


def commit_name(index: int) -> str:
    """Where the record of shard `index` is."""
    return f"commits/{index:05d}.json"


def shard_keys(plan: Plan, commit: ShardCommit) -> tuple[str, ...]:
    """The keys of a shard's rows in order: those planned, less those rejected."""
    rejected = {sample.key for sample in commit.rejected}
    return tuple(key for key, _ in plan.shards[commit.index] if key not in rejected)


def shard_metadata(plan: Plan, index: int) -> dict[str, str]:
    """What every shard says of itself; names its cache, so that shards cannot be mixed."""
    return {
        "emkd.cache": plan.fingerprint,
        "emkd.layout_version": str(plan.spec.layout_version),
        "emkd.shard": str(index),
        "emkd.spec": to_json(plan.spec),
    }


def open_shard(cache: Store, plan: Plan, commit: ShardCommit) -> Shard:
    """Open a committed shard: size, identity and row count have been checked.

    Raises `ShardCorruptError` naming the file and the remedy.
    """
    require_shard_file(cache, commit)
    path = cache.local(commit.file, commit.num_bytes, commit.sha256)
    shard = shard_format(plan.format).open(path)
    expected = shard_metadata(plan, commit.index)
    for field in sorted(expected.keys() | shard.metadata.keys()):
        if shard.metadata.get(field) != expected.get(field):
            raise ShardCorruptError(
                f"{path} is not shard {commit.index} of this cache: {field} is "
                f"{shard.metadata.get(field)!r}, expected {expected.get(field)!r}; {REMEDY}"
            )
    num_keys = len(shard_keys(plan, commit))
    if not shard.num_rows == num_keys == commit.num_rows:
        raise ShardCorruptError(
            f"{path}: found {shard.num_rows} rows, the plan has {num_keys}, the commit record "
            f"{commit.num_rows}; {REMEDY}"
        )
    return shard


def require_shard_file(cache: Store, commit: ShardCommit) -> None:
    """Raise `ShardCorruptError` unless a committed shard is there in its full size.

    Refuses records that point out of the cache.
    """
    if not re.fullmatch(r"shards/[0-9]+-[0-9a-f]+\.[a-z]+", commit.file):
        raise ShardCorruptError(f"{cache}: shard {commit.index} is said to be {commit.file!r}")
    num_bytes = cache.size(commit.file, expected=True)
    if num_bytes is None:
        raise ShardCorruptError(f"{cache.where(commit.file)} is missing; {REMEDY}")
    if num_bytes != commit.num_bytes:
        raise ShardCorruptError(
            f"{cache.where(commit.file)}: found {num_bytes} bytes, {commit.num_bytes} were "
            f"committed; {REMEDY}"
        )


def require_shard_files(cache: Store, commits: Iterable[ShardCommit]) -> None:
    """`require_shard_file` of each, several at a time."""
    with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        for _ in pool.map(lambda commit: require_shard_file(cache, commit), commits):
            pass


def read_head(cache: Store, spec: CacheSpec) -> LmHead:
    """The LM head of a hidden-tier cache; its content is checked against the spec."""
    return _asset(cache, HEAD_FILE, spec.head_digest, LmHead.from_tensors)


def read_sketch(cache: Store, spec: CacheSpec) -> SketchBasis:
    """The basis of a sketch-tier cache; its content is checked against the spec."""
    return _asset(cache, SKETCH_FILE, spec.sketch_digest, SketchBasis.from_tensors)


def _asset(
    cache: Store, name: str, digest: str | None, build: Callable[[Mapping[str, Tensor]], A]
) -> A:
    if digest is None:
        raise ValueError(f"this cache has no {name}: its records need none")
    try:
        with cache.fetched(name) as file:
            asset = build(load_file(file))
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise ShardCorruptError(
            f"{cache.where(name)} cannot be read: {error}; {_ASSET_REMEDY}"
        ) from error
    if asset.digest != digest:
        raise ShardCorruptError(
            f"{cache.where(name)}: content {asset.digest}, the spec says {digest}; {_ASSET_REMEDY}"
        )
    return asset


def _read(cache: Store, name: str, kind: type[R]) -> R | None:
    try:
        data = cache.read(name)
    except FileNotFoundError:
        return None
    return decode_json(kind, data, cache.where(name))
