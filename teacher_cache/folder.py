"""What lies where in a cache folder, and how each piece is read; nothing here writes.

    plan.json, SEALED.json              see manifest.py
    commits/<k>.json                    the record that makes shard k exist
    shards/<k>-<sha256>.<arrow|tar>     named by content: equal attempts meet, others never clash
    head.safetensors, sketch.safetensors    the assets, checked against their digests in the spec

Names that begin with a dot are private files of a running or a killed build and mean nothing.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
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

PLAN_FILE = "plan.json"
SEAL_FILE = "SEALED.json"
HEAD_FILE = "head.safetensors"
SKETCH_FILE = "sketch.safetensors"

REMEDY = "delete SEALED.json and this shard's commits/*.json, and run the same emkd build again"
"""What heals a damaged shard: every other shard stays."""
_ASSET_REMEDY = "delete SEALED.json, build.json and this file, and run the same emkd build again"

A = TypeVar("A", LmHead, SketchBasis)


def read_plan(cache: Path) -> Plan | None:
    """The plan; None where there is none yet."""
    file = cache / PLAN_FILE
    return decode_json(Plan, file.read_bytes(), str(file)) if file.exists() else None


def read_seal(cache: Path) -> Seal | None:
    """The seal; None while the cache is not complete."""
    file = cache / SEAL_FILE
    return decode_json(Seal, file.read_bytes(), str(file)) if file.exists() else None


def require_plan(cache: Path) -> Plan:
    """The plan; `IncompleteCacheError` where there is none."""
    plan = read_plan(cache)
    if plan is None:
        raise IncompleteCacheError(
            f"{cache} is not a cache: it has no {PLAN_FILE}; give the folder that emkd build wrote"
        )
    return plan


def require_seal(cache: Path) -> Seal:
    """The seal; `IncompleteCacheError` with how far the build is and the remedy."""
    seal = read_seal(cache)
    if seal is not None:
        return seal
    num_shards, num_committed = len(require_plan(cache).shards), len(committed(cache))
    raise IncompleteCacheError(
        f"{cache}: {num_committed} of {num_shards} shards are committed and the cache is not "
        "sealed; run the same emkd build again, it does the rest"
    )


def require_same_plan(cache: Path, seal: Seal) -> Plan:
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


def committed(cache: Path) -> dict[int, ShardCommit]:
    """The records of all committed shards by shard number."""
    found: dict[int, ShardCommit] = {}
    for file in sorted((cache / "commits").glob("[0-9]*.json")):
        commit = decode_json(ShardCommit, file.read_bytes(), str(file))
        if file != commit_path(cache, commit.index):
            raise DecodeError(f"{file} holds the record of shard {commit.index}")
        found[commit.index] = commit
    return found


def commit_path(cache: Path, index: int) -> Path:
    """Where the record of shard `index` is."""
    return cache / "commits" / f"{index:05d}.json"


def shard_path(cache: Path, commit: ShardCommit) -> Path:
    """Where a committed shard is; refuses records that point out of the cache."""
    if not re.fullmatch(r"shards/[0-9]+-[0-9a-f]+\.[a-z]+", commit.file):
        raise ShardCorruptError(f"{cache}: shard {commit.index} is said to be {commit.file!r}")
    return cache / commit.file


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


def open_shard(cache: Path, plan: Plan, commit: ShardCommit) -> Shard:
    """Open a committed shard: size, identity and row count have been checked.

    Raises `ShardCorruptError` naming the file and the remedy.
    """
    path = require_shard_file(cache, commit)
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


def require_shard_file(cache: Path, commit: ShardCommit) -> Path:
    """The path of a committed shard; `ShardCorruptError` unless it is there in its full size."""
    path = shard_path(cache, commit)
    if not path.is_file():
        raise ShardCorruptError(f"{path} is missing; {REMEDY}")
    num_bytes = path.stat().st_size
    if num_bytes != commit.num_bytes:
        raise ShardCorruptError(
            f"{path}: found {num_bytes} bytes, {commit.num_bytes} were committed; {REMEDY}"
        )
    return path


def read_head(cache: Path, spec: CacheSpec) -> LmHead:
    """The LM head of a hidden-tier cache; its content is checked against the spec."""
    return _asset(cache / HEAD_FILE, spec.head_digest, LmHead.from_tensors)


def read_sketch(cache: Path, spec: CacheSpec) -> SketchBasis:
    """The basis of a sketch-tier cache; its content is checked against the spec."""
    return _asset(cache / SKETCH_FILE, spec.sketch_digest, SketchBasis.from_tensors)


def _asset(file: Path, digest: str | None, build: Callable[[Mapping[str, Tensor]], A]) -> A:
    if digest is None:
        raise ValueError(f"this cache has no {file.name}: its records need none")
    try:
        asset = build(load_file(file))
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise ShardCorruptError(f"{file} cannot be read: {error}; {_ASSET_REMEDY}") from error
    if asset.digest != digest:
        raise ShardCorruptError(
            f"{file}: content {asset.digest}, the spec says {digest}; {_ASSET_REMEDY}"
        )
    return asset
