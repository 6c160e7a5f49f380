"""Writes a cache: plan, assets, shards, seal. Nothing is ever half there, whatever is killed when.

A shard is encoded into a private file, read back, published under the name of its content, and
made to exist by the exclusive creation of commits/<k>.json: the first of several builders wins,
the others take over its record. SEALED.json is created last. Resuming is running again. Equal
rows give equal bytes; only `seconds` in a commit record tells two builds apart. Refuses rows that
are not those of the plan, and plans other than the one that is there.
"""

from collections import Counter
from collections.abc import Sequence

from safetensors.torch import save_file
from torch import Tensor

from teacher_cache.codec import planes_of
from teacher_cache.decode import decode_json
from teacher_cache.folder import (
    HEAD_FILE,
    PLAN_FILE,
    SEAL_FILE,
    SKETCH_FILE,
    commit_name,
    committed,
    open_shard,
    read_seal,
    require_plan,
    require_shard_files,
    shard_keys,
    shard_metadata,
)
from teacher_cache.head import LmHead
from teacher_cache.manifest import (
    CacheMismatchError,
    IncompleteCacheError,
    Plan,
    Seal,
    ShardCommit,
    ShardCorruptError,
    require_equal,
    to_json,
)
from teacher_cache.rows import encode_row, tier_parts
from teacher_cache.schema import CachedSample, RejectedSample
from teacher_cache.shard_format import shard_format
from teacher_cache.sketch import SketchBasis
from teacher_cache.storage import Store, sha256_file


def write_plan(cache: Store, plan: Plan) -> Plan:
    """Create plan.json, or check that the plan that is there is this one.

    Raises `CacheMismatchError` with the differing fields: another spec, format or other samples.
    """
    counts = Counter(key for shard in plan.shards for key, _ in shard)
    repeated = [key for key, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(f"a plan names each key once; repeated: {repeated[:5]}")
    cache.create_exclusive(PLAN_FILE, to_json(plan).encode())
    stored = require_plan(cache)
    require_equal(
        stored,
        plan,
        f"{cache} was begun with another plan, which",
        "Give the settings, teacher and source that it was begun with, or another --out folder.",
    )
    return stored


def write_assets(cache: Store, head: LmHead | None, sketch: SketchBasis | None) -> None:
    """Store what the plan's spec refers to, LM head or sketch basis; replaces damaged files.

    Raises `CacheMismatchError` unless their digests are those of the spec.
    """
    spec = require_plan(cache).spec
    for name, asset, digest in (
        (HEAD_FILE, head, spec.head_digest),
        (SKETCH_FILE, sketch, spec.sketch_digest),
    ):
        found = None if asset is None else asset.digest
        if found != digest:
            raise CacheMismatchError(
                f"{cache.where(name)}: content {found}, the spec says {digest}"
            )
        if asset is not None:
            with cache.attempt(name) as attempt:
                save_file(_contiguous(asset.tensors()), attempt)
                cache.publish(attempt, name)


def write_shard(
    cache: Store,
    plan: Plan,
    index: int,
    rows: Sequence[CachedSample],
    rejected: Sequence[RejectedSample],
    seconds: float,
) -> ShardCommit:
    """Write, check and commit shard `index`; returns its record, or that of whoever was first.

    `rows` and `rejected` together are the shard's samples in the order of the plan.
    """
    _require_planned(plan, index, rows, rejected)
    form = shard_format(plan.format)
    with cache.attempt(f"shards/{index:05d}{form.suffix}") as attempt:
        planes = planes_of(tier_parts(plan.spec))
        encoded = (encode_row(row, plan.spec) for row in rows)
        form.write(attempt, encoded, planes, shard_metadata(plan, index))
        shard = form.open(attempt)
        found = tuple(shard.read(row, planes).key for row in range(shard.num_rows))
        if found != tuple(row.sample.key for row in rows):
            raise ShardCorruptError(f"{attempt}: what was written does not read back")
        sha256 = sha256_file(attempt)
        commit = ShardCommit(
            index=index,
            file=f"shards/{index:05d}-{sha256[:16]}{form.suffix}",
            num_bytes=attempt.stat().st_size,
            sha256=sha256,
            num_rows=len(rows),
            num_vision_tokens=sum(view.num_tokens for row in rows for view in row.output.views),
            num_response_tokens=sum(int(row.output.is_response.sum()) for row in rows),
            rejected=tuple(rejected),
            seconds=seconds,
        )
        cache.publish(attempt, commit.file)
    name = commit_name(index)
    if cache.create_exclusive(name, to_json(commit).encode()):
        return commit
    # Our file, if it is another than the winner's, stays unreferenced until `emkd gc` is run.
    return decode_json(ShardCommit, cache.read(name), cache.where(name))


def seal_cache(cache: Store) -> Seal:
    """Seal a cache whose shards are all committed, after checking them against the plan.

    Raises `IncompleteCacheError` while shards are missing, `ShardCorruptError` for a shard that is
    not there in its full size or, where looking costs nothing (on a disk), whose rows are not those
    of the plan. Sealing again returns the seal that is there.
    """
    plan, commits = require_plan(cache), committed(cache)
    sealed = read_seal(cache)
    if sealed is not None:
        remedy = "Delete SEALED.json and run the same emkd build again."
        require_equal(sealed.fingerprint, plan.fingerprint, f"{cache}: the seal's plan", remedy)
        return sealed
    unplanned = sorted(index for index in commits if index >= len(plan.shards))
    if unplanned:
        raise CacheMismatchError(
            f"{cache}: shards {unplanned} are committed, the plan has {len(plan.shards)}; "
            "the folder is a mixture of two caches, build into a new one"
        )
    missing = [index for index in range(len(plan.shards)) if index not in commits]
    if missing:
        raise IncompleteCacheError(
            f"{cache}: {len(commits)} of {len(plan.shards)} shards are committed; "
            f"missing: {missing[:10]}; run the same emkd build again"
        )
    require_shard_files(cache, commits.values())
    for commit in commits.values() if cache.in_place else ():
        shard = open_shard(cache, plan, commit)
        if shard.keys != shard_keys(plan, commit):
            raise ShardCorruptError(f"{shard.path}: its rows are not those of the plan")
    seal = Seal(
        fingerprint=plan.fingerprint,
        spec=plan.spec,
        format=plan.format,
        source=plan.source,
        shards=tuple(commits[index] for index in range(len(plan.shards))),
        rejected=plan.rejected + tuple(r for c in commits.values() for r in c.rejected),
    )
    if not seal.num_samples:
        raise ValueError(
            f"{cache}: every sample was rejected, a cache of none is of no use: {seal.rejected[:3]}"
        )
    cache.create_exclusive(SEAL_FILE, to_json(seal).encode())
    return seal


def _require_planned(
    plan: Plan, index: int, rows: Sequence[CachedSample], rejected: Sequence[RejectedSample]
) -> None:
    refused = [sample.key for sample in rejected]
    wanted = [key for key, _ in plan.shards[index] if key not in set(refused)]
    found = [row.sample.key for row in rows]
    if found != wanted or len(found) + len(refused) != len(plan.shards[index]):
        raise ValueError(
            f"shard {index}: {len(found)} rows and {len(refused)} rejected samples are not the "
            f"{len(plan.shards[index])} samples of the plan in its order"
        )


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
