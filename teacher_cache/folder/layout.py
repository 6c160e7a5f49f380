"""Defines the files of a cache folder and reads each of them; nothing here writes.

    plan.json, SEALED.json              see manifest.py
    commits/<k>.json                    the record that makes shard k exist
    shards/<k>-<sha256>.<arrow|tar>     named by content, so equal attempts write one name
    head.safetensors, sketch.safetensors, template.safetensors
                                        the assets, checked against their digests in the spec

Names that begin with a dot are private files of a running or killed build; readers ignore them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from teacher_cache.records.assets import TeacherAssets
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.sketch import SketchBasis
from teacher_cache.records.tail_template import TailTemplate
from teacher_cache.schema.errors import DecodeError, IncompleteCacheError, ShardCorruptError
from teacher_cache.schema.manifest import (
    CacheSpec,
    Plan,
    Seal,
    ShardCommit,
    ShardFile,
    cache_fingerprint,
    read_record,
    require_equal,
    to_json,
)
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.schema.regular_file import require_readable
from teacher_cache.schema.samples import RejectedSample
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.shards.formats import shard_format
from teacher_cache.shards.layered import LayeredShard
from teacher_cache.shards.shard import Shard
from teacher_cache.storage.store import Store

PLAN_FILE = "plan.json"
SEAL_FILE = "SEALED.json"
HEAD_FILE = "head.safetensors"
SKETCH_FILE = "sketch.safetensors"
TEMPLATE_FILE = "template.safetensors"

REMEDY = "delete SEALED.json and this shard's commits/*.json, and run the same emkd command again"
"""How to repair a damaged shard; all other shards stay."""
_ASSET_REMEDY = "delete SEALED.json, build.json and this file, and run the same emkd command again"

_NUM_REQUESTS = 8
"""Files requested at a time: each request to an object store takes long."""

_A = TypeVar("_A", LmHead, SketchBasis, TailTemplate)
_R = TypeVar("_R", Plan, Seal, ShardCommit)


def read_plan(cache: Store) -> Plan | None:
    """The plan; None before it is written."""
    return _read(cache, PLAN_FILE, Plan)


def read_seal(cache: Store) -> Seal | None:
    """The seal; None while the cache is incomplete."""
    return _read(cache, SEAL_FILE, Seal)


def require_plan(cache: Store) -> Plan:
    """The plan; `IncompleteCacheError` where there is none."""
    plan = read_plan(cache)
    if plan is None:
        why = cache.absence() or f"it has no {PLAN_FILE}"
        raise IncompleteCacheError(
            f"{cache} is not a cache: {why}; give the folder or URL that emkd build wrote"
        )
    return plan


def require_seal(cache: Store) -> Seal:
    """The seal; `IncompleteCacheError` with the progress of the build and the remedy."""
    seal = read_seal(cache)
    if seal is not None:
        return seal
    num_shards, num_committed = len(require_plan(cache).shards), len(committed(cache))
    raise IncompleteCacheError(
        f"{cache}: {num_committed} of {num_shards} shards are committed and the cache is not "
        f"sealed (it has no {SEAL_FILE}); run the same emkd command again, it writes the rest"
    )


def require_same_plan(cache: Store, seal: Seal) -> Plan:
    """The plan that was sealed; `CacheMismatchError` where plan and seal disagree."""
    plan = require_plan(cache)
    what = f"{cache}: what {SEAL_FILE} says beside {PLAN_FILE} of"
    remedy = "The folder is damaged or a mixture of two caches: build it again."
    require_equal(seal.spec, plan.spec, f"{what} the spec", remedy)
    require_equal(seal.format, plan.format, f"{what} the format", remedy)
    require_equal(seal.plan, plan.fingerprint, f"{what} the plan", remedy)
    sealed = [(commit.index, commit.num_rows) for commit in seal.shards]
    numbers = range(len(plan.shards))
    if [index for index, _ in sealed] == list(numbers):
        planned = [(index, len(shard_keys(plan, seal.shards[index]))) for index in numbers]
    else:
        planned = [(index, len(plan.shards[index])) for index in numbers]
    require_equal(sealed, planned, f"{what} shards and rows", remedy)
    found = sealed_fingerprint(plan, seal.shards)
    require_equal(seal.fingerprint, found, f"{what} the fingerprint", remedy)
    return plan


def sealed_fingerprint(plan: Plan, commits: Sequence[ShardCommit]) -> str:
    """The identity of a cache; builds of one plan that rejected different samples differ."""
    return cache_fingerprint(plan.spec, [shard_keys(plan, commit) for commit in commits])


def read_commit(cache: Store, index: int) -> ShardCommit | None:
    """The commit record of shard `index`; None before it is committed."""
    name = commit_name(index)
    commit = _read(cache, name, ShardCommit)
    if commit is not None and commit.index != index:
        raise DecodeError(f"{cache.where(name)} holds the record of shard {commit.index}")
    return commit


def committed(cache: Store) -> dict[int, ShardCommit]:
    """The commit records of all committed shards, by shard number."""
    names = [re.fullmatch(r"commits/([0-9]{5,})\.json", name) for name in cache.names("commits")]
    with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        numbers = sorted(int(match[1]) for match in names if match)
        commits = pool.map(lambda index: read_commit(cache, index), numbers)
        return {commit.index: commit for commit in commits if commit is not None}


def commit_name(index: int) -> str:
    """The file name of the commit record of shard `index`."""
    return f"commits/{index:05d}.json"


def shard_keys(plan: Plan, commit: ShardCommit) -> tuple[str, ...]:
    """The keys of a shard's rows in order: the planned ones without the rejected ones."""
    return kept_keys(plan, commit.index, commit.rejected)


def kept_keys(plan: Plan, index: int, rejected: Sequence[RejectedSample]) -> tuple[str, ...]:
    """The keys planned for shard `index` in order, without the rejected ones."""
    refused = {sample.key for sample in rejected}
    return tuple(key for key, _ in plan.shards[index] if key not in refused)


def shard_metadata(plan: Plan, index: int) -> dict[str, str]:
    """The metadata of every shard file; they name the cache, so shards cannot be mixed."""
    return {
        "emkd.cache": plan.fingerprint,
        "emkd.layout_version": str(plan.spec.layout_version),
        "emkd.shard": str(index),
        "emkd.spec": to_json(plan.spec),
    }


def open_shard(cache: Store, plan: Plan, commit: ShardCommit) -> Shard:
    """Open a committed shard after checking sizes, identity and number of rows.

    Raises `ShardCorruptError` naming the file and the remedy.
    """
    for file in commit.files:
        require_shard_file(cache, file)
    paths = [cache.local(file.file, file.num_bytes, file.sha256) for file in commit.files]
    return open_files(plan, commit, paths)


def open_files(plan: Plan, commit: ShardCommit, paths: Sequence[Path]) -> Shard:
    """Open a shard from local copies of its files, as `open_shard` does."""
    num_keys = len(shard_keys(plan, commit))
    layers: list[Shard] = []
    for file, path in zip(commit.files, paths, strict=True):
        require_readable(path)
        layer = shard_format(plan.format).open(path)
        _require_identity(layer, file, plan)
        if not layer.num_rows == num_keys == commit.num_rows:
            raise ShardCorruptError(
                f"{path}: found {layer.num_rows} rows, the plan has {num_keys}, the commit record "
                f"{commit.num_rows}; {REMEDY}"
            )
        layers.append(layer)
    if not layers:
        raise ShardCorruptError(f"the commit record of shard {commit.index} names no file")
    if len(layers) == 1:
        return layers[0]
    return LayeredShard(layers, [file.columns for file in commit.files])


def read_encoded_rows(
    cache: Store, plan: Plan, commit: ShardCommit, numbers: Iterable[int] | None = None
) -> Iterator[EncodedRow]:
    """Rows of a committed shard (default: all), with all their columns, as frames, unopened.

    Every byte has been checked and every key is the planned one: `write_encoded_shard` of another
    cache takes them as they are. Raises `ShardCorruptError`.
    """
    shard, keys = open_shard(cache, plan, commit), shard_keys(plan, commit)
    columns = {name for file in commit.files for name in file.columns}
    for number in range(len(keys)) if numbers is None else numbers:
        row, key = shard.read(number, columns), keys[number]
        if row.key != key:
            raise ShardCorruptError(
                f"{shard.path}: row {number} holds sample {row.key}, the plan has {key}; {REMEDY}"
            )
        yield row


def shard_name(index: int, sha256: str, form: ShardFormatName) -> str:
    """The file name of a file of shard `index` with this content."""
    return f"shards/{index:05d}-{sha256[:16]}{shard_format(form).suffix}"


def require_shard_file(cache: Store, file: ShardFile) -> None:
    """Raise `ShardCorruptError` unless a shard file exists with its committed size.

    Refuses names outside the cache folder.
    """
    if not re.fullmatch(r"shards/[0-9]+-[0-9a-f]+\.[a-z]+", file.file):
        raise ShardCorruptError(
            f"{cache}: a commit record names the shard file {file.file!r}, expected "
            "shards/<number>-<digest>.<arrow|tar>"
        )
    num_bytes = cache.size(file.file, expected=True)
    if num_bytes is None:
        raise ShardCorruptError(f"{cache.where(file.file)} is missing; {REMEDY}")
    if num_bytes != file.num_bytes:
        raise ShardCorruptError(
            f"{cache.where(file.file)}: found {num_bytes} bytes, {file.num_bytes} were "
            f"committed; {REMEDY}"
        )


def require_shard_files(cache: Store, commits: Iterable[ShardCommit]) -> None:
    """`require_shard_file` for each file, several at a time where there are many."""
    files = [file for commit in commits for file in commit.files]
    if len(files) <= _NUM_REQUESTS:  # starting threads takes longer than checking the files
        for file in files:
            require_shard_file(cache, file)
        return
    with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        for _ in pool.map(lambda file: require_shard_file(cache, file), files):
            pass


def _require_identity(shard: Shard, file: ShardFile, plan: Plan) -> None:
    """Refuse a file whose metadata differ from its commit record."""
    found = shard.metadata
    wanted = shard_metadata(plan, file.index) | {"emkd.cache": file.cache}
    if file.cache != plan.fingerprint and "emkd.spec" in found:
        wanted["emkd.spec"] = found["emkd.spec"]  # of the cache it was written for
    for field in sorted(wanted.keys() | found.keys()):
        if found.get(field) != wanted.get(field):
            raise ShardCorruptError(
                f"{shard.path} is not the file of shard {file.index} that was committed: {field} "
                f"is {found.get(field)!r}, expected {wanted.get(field)!r}; {REMEDY}"
            )


def read_head(cache: Store, spec: CacheSpec) -> LmHead | None:
    """The LM head, checked against its digest in the spec; None where the cache has none."""
    return _asset(cache, HEAD_FILE, spec.head_digest, LmHead.from_tensors)


def read_sketch(cache: Store, spec: CacheSpec) -> SketchBasis | None:
    """The sketch basis, checked against its digest in the spec; None where the cache has none."""
    return _asset(cache, SKETCH_FILE, spec.sketch_digest, SketchBasis.from_tensors)


def read_template(cache: Store, spec: CacheSpec) -> TailTemplate | None:
    """The tail template, checked against its digest in the spec; None where the cache has none."""
    return _asset(cache, TEMPLATE_FILE, spec.template_digest, TailTemplate.from_tensors)


def read_assets(cache: Store, spec: CacheSpec) -> TeacherAssets:
    """All assets of a cache; raises `ShardCorruptError` for a file that is missing or damaged."""
    return TeacherAssets(
        head=read_head(cache, spec),
        sketch=read_sketch(cache, spec),
        template=read_template(cache, spec),
    )


def _asset(
    cache: Store, name: str, digest: str | None, build: Callable[[Mapping[str, Tensor]], _A]
) -> _A | None:
    if digest is None:
        return None
    try:
        with cache.fetched(name) as file:
            require_readable(file)
            asset = build(load_file(file))
    except PermissionError:
        raise
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise ShardCorruptError(
            f"{cache.where(name)} cannot be read: {error}; {_ASSET_REMEDY}"
        ) from error
    if asset.digest != digest:
        raise ShardCorruptError(
            f"{cache.where(name)}: content {asset.digest}, the spec says {digest}; {_ASSET_REMEDY}"
        )
    return asset


def _read(cache: Store, name: str, kind: type[_R]) -> _R | None:
    try:
        data = cache.read(name)
    except FileNotFoundError:
        return None
    return read_record(kind, data, cache.where(name))
