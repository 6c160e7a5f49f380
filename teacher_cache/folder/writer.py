"""Writes a cache: plan, assets, shards, seal. A killed process never leaves a half-written file.

A shard is written to a private file, read back, published under a name made from its content, and
committed by the exclusive creation of commits/<k>.json: of several builders the first wins, and the
others return its record. SEALED.json is created last. Running a build again resumes it. Equal rows
give equal bytes; only `seconds` in a commit record differs. Refuses rows that are not those of the
plan, and a plan that differs from the stored one.
"""

import errno
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from safetensors import SafetensorError
from safetensors.torch import save_file

from teacher_cache.codec.columns import columns_of
from teacher_cache.folder.layout import (
    HEAD_FILE,
    PLAN_FILE,
    SEAL_FILE,
    SKETCH_FILE,
    TEMPLATE_FILE,
    commit_name,
    committed,
    kept_keys,
    open_shard,
    read_seal,
    require_plan,
    require_shard_files,
    sealed_fingerprint,
    shard_keys,
    shard_metadata,
    shard_name,
)
from teacher_cache.folder.row_counts import COUNTS, count_row, counted_rows
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.errors import CacheMismatchError, IncompleteCacheError, ShardCorruptError
from teacher_cache.schema.manifest import (
    Plan,
    Seal,
    ShardCommit,
    ShardFile,
    read_record,
    record_bytes,
    require_equal,
)
from teacher_cache.schema.samples import RejectedSample
from teacher_cache.schema.shard_quality import ShardQuality
from teacher_cache.schema.teacher_output import CachedSample
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.shards.formats import shard_format
from teacher_cache.shards.rows import encode_rows, tier_parts
from teacher_cache.storage.durable_files import naming_full_disk, sha256_file
from teacher_cache.storage.store import Store


def write_plan(cache: Store, plan: Plan) -> Plan:
    """Create plan.json, or check that the stored plan equals this one.

    Raises `CacheMismatchError` with the fields that differ: spec, format or samples.
    """
    counts = Counter(key for shard in plan.shards for key, _ in shard)
    repeated = [key for key, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(f"a plan names each key once; repeated: {repeated[:5]}")
    cache.create_exclusive(PLAN_FILE, record_bytes(plan))
    stored = require_plan(cache)
    require_equal(
        stored,
        plan,
        f"{cache} was begun with another plan, which",
        "Give the settings, teacher, source and caches it was begun with, or another --out folder.",
    )
    return stored


def write_assets(cache: Store, assets: TeacherAssets) -> None:
    """Write the assets that the plan's spec names; replaces damaged files.

    Raises `CacheMismatchError` unless their digests are those of the spec.
    """
    spec = require_plan(cache).spec
    for name, asset, digest in (
        (HEAD_FILE, assets.head, spec.head_digest),
        (SKETCH_FILE, assets.sketch, spec.sketch_digest),
        (TEMPLATE_FILE, assets.template, spec.template_digest),
    ):
        found = None if asset is None else asset.digest
        if found != digest:
            raise CacheMismatchError(
                f"{cache.where(name)}: content {found}, the spec says {digest}"
            )
        if asset is not None:
            with cache.attempt(name) as attempt, naming_full_disk(attempt):
                attempt.touch()
                mode = attempt.stat().st_mode  # by the umask; safetensors makes private files
                tensors = asset.tensors().items()
                contiguous = {key: t.detach().cpu().contiguous() for key, t in tensors}
                try:
                    save_file(contiguous, attempt)
                except SafetensorError as error:
                    if "StorageFull" not in str(error):
                        raise
                    raise OSError(errno.ENOSPC, str(error)) from error
                attempt.chmod(mode)
                cache.publish(attempt, name)


def write_shard(
    cache: Store,
    plan: Plan,
    index: int,
    rows: Sequence[CachedSample],
    rejected: Sequence[RejectedSample],
    seconds: float,
    quality: ShardQuality | None = None,
) -> ShardCommit:
    """Write, check and commit shard `index`; returns the record of the attempt that won.

    `rows` and `rejected` together are the shard's samples in the order of the plan.
    """
    counts = Counter[str]()
    for row in rows:
        count_row(row.output, row.output.shared_from, counts)
    encoded = encode_rows(rows, plan.spec)
    return _write_and_commit(cache, plan, index, encoded, counts, rejected, seconds, quality)


def write_encoded_shard(
    cache: Store, plan: Plan, index: int, rows: Iterable[EncodedRow], seconds: float = 0.0
) -> ShardCommit:
    """Like `write_shard`, for encoded rows, such as those of `read_encoded_rows`."""
    counts = Counter[str]()
    return _write_and_commit(
        cache, plan, index, counted_rows(rows, counts), counts, (), seconds, None
    )


def _write_and_commit(
    cache: Store,
    plan: Plan,
    index: int,
    rows: Iterable[EncodedRow],
    counts: Mapping[str, int],
    rejected: Sequence[RejectedSample],
    seconds: float,
    quality: ShardQuality | None,
) -> ShardCommit:
    """`counts` is complete once the last row has been taken."""
    columns = columns_of(tier_parts(plan.spec), plan.spec)
    file = write_shard_file(cache, plan, index, rows, columns, rejected)
    commit = ShardCommit(
        index=index,
        files=(file,),
        **{name: counts[name] for name in COUNTS},
        rejected=tuple(rejected),
        seconds=seconds,
        quality=quality,
    )
    return commit_shard(cache, plan, commit)


def write_shard_file(
    cache: Store,
    plan: Plan,
    index: int,
    rows: Iterable[EncodedRow],
    columns: Collection[str],
    rejected: Sequence[RejectedSample] = (),
) -> ShardFile:
    """Write, read back and publish one file of shard `index`; it counts once it is committed.

    Its rows are the samples of the shard in the order of the plan, without the rejected ones, each
    with exactly the columns named. A layer's rows are those of the first file without the images.
    """
    keys = _wanted_keys(plan, index, rejected)
    checked, metadata = _in_order(rows, keys, index), shard_metadata(plan, index)
    name, num_bytes, sha256 = publish_rows(cache, plan, index, checked, keys, columns, metadata)
    return ShardFile(
        file=name,
        num_bytes=num_bytes,
        sha256=sha256,
        cache=plan.fingerprint,
        index=index,
        columns=tuple(sorted(columns)),
    )


def publish_rows(
    cache: Store,
    plan: Plan,
    index: int,
    rows: Iterable[EncodedRow],
    keys: Sequence[str],
    columns: Collection[str],
    metadata: Mapping[str, str],
) -> tuple[str, int, str]:
    """Write a file in the plan's format, read it back and publish it: its name, bytes and SHA-256.

    Raises `ShardCorruptError` unless `keys` are read back.
    """
    form = shard_format(plan.format)
    name = f"shards/{index:05d}{form.suffix}"
    with cache.attempt(name) as attempt, naming_full_disk(attempt):
        form.write(attempt, rows, columns, metadata)
        shard = form.open(attempt)
        if [shard.read(row, columns).key for row in range(shard.num_rows)] != [*keys]:
            raise ShardCorruptError(f"{attempt}: what was written does not read back")
        sha256 = sha256_file(attempt)
        name, num_bytes = shard_name(index, sha256, plan.format), attempt.stat().st_size
        cache.publish(attempt, name)
    return name, num_bytes, sha256


def commit_shard(cache: Store, plan: Plan, commit: ShardCommit) -> ShardCommit:
    """Make shard `commit.index` exist; returns the record of the attempt that won.

    The files must exist: written by `write_shard_file`, or copied (`Store.copy_from`) from another
    cache under their `shard_name`; then `ShardFile.cache` and `.index` name the cache and shard
    they were written for. Raises ValueError unless files and counts match the plan,
    `ShardCorruptError` for a file that is missing or has another size.
    """
    keys = _wanted_keys(plan, commit.index, commit.rejected)
    if commit.num_rows != len(keys):
        raise ValueError(
            f"shard {commit.index}: {commit.num_rows} rows and {len(commit.rejected)} rejected "
            f"samples are not the {len(plan.shards[commit.index])} samples of the plan"
        )
    found = sorted(name for file in commit.files for name in file.columns)
    wanted = sorted(columns_of(tier_parts(plan.spec), plan.spec))
    if found != wanted:
        raise ValueError(f"shard {commit.index}: its files hold columns {found}, not {wanted}")
    require_shard_files(cache, [commit])
    name = commit_name(commit.index)
    if cache.create_exclusive(name, record_bytes(commit)):
        return commit
    # Files of a losing attempt stay until `emkd gc` runs: at this moment nobody can know whether
    # a record names them.
    return read_record(ShardCommit, cache.read(name), cache.where(name))


def seal_cache(cache: Store) -> Seal:
    """Seal a cache whose shards are all committed, after checking them against the plan.

    Raises `IncompleteCacheError` while shards are missing, `ShardCorruptError` for a shard that is
    missing, has another size or, on a disk, has other rows than the plan. Sealing again returns the
    existing seal.
    """
    plan, commits = require_plan(cache), committed(cache)
    sealed = read_seal(cache)
    if sealed is not None:
        remedy = "Delete SEALED.json and run the same emkd command again."
        require_equal(sealed.plan, plan.fingerprint, f"{cache}: the seal's plan", remedy)
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
            f"missing: {missing[:10]}; run the same emkd command again"
        )
    require_shard_files(cache, commits.values())
    for commit in commits.values() if cache.in_place else ():
        shard = open_shard(cache, plan, commit)
        if shard.keys != shard_keys(plan, commit):
            raise ShardCorruptError(f"{shard.path}: its rows are not those of the plan")
    shards = tuple(commits[index] for index in range(len(plan.shards)))
    seal = Seal(
        fingerprint=sealed_fingerprint(plan, shards),
        plan=plan.fingerprint,
        spec=plan.spec,
        format=plan.format,
        source=plan.source,
        shards=shards,
        rejected=plan.rejected + tuple(r for c in commits.values() for r in c.rejected),
    )
    if not seal.num_samples:
        raise ValueError(
            f"{cache}: every sample was rejected, so the cache would be empty: {seal.rejected[:3]}"
        )
    cache.create_exclusive(SEAL_FILE, record_bytes(seal))
    return seal


def _wanted_keys(plan: Plan, index: int, rejected: Sequence[RejectedSample]) -> tuple[str, ...]:
    """Keys of the rows of a shard; ValueError for rejected samples of another shard."""
    if not 0 <= index < len(plan.shards):
        raise ValueError(f"shard {index}: the plan has {len(plan.shards)} shards")
    keys = kept_keys(plan, index, rejected)
    if len(keys) + len(rejected) != len(plan.shards[index]):
        raise ValueError(
            f"shard {index}: some of the {len(rejected)} rejected samples are not among the "
            f"{len(plan.shards[index])} samples of the plan"
        )
    return keys


def _in_order(rows: Iterable[EncodedRow], keys: Sequence[str], index: int) -> Iterator[EncodedRow]:
    """Pass the rows on; ValueError at the first one that is not the planned one."""
    number = -1
    for number, row in enumerate(rows):
        if number >= len(keys) or row.key != keys[number]:
            planned = keys[number] if number < len(keys) else "no more"
            raise ValueError(
                f"shard {index}: its rows are not the samples of the plan in its order: "
                f"row {number} is {row.key}, planned is {planned}"
            )
        yield row
    if number + 1 != len(keys):
        raise ValueError(
            f"shard {index}: its {number + 1} rows are not the samples of the plan, "
            f"{len(keys)} of which were not rejected"
        )
