"""`emkd build` and `emkd extend`: a pool of teacher actors, each of which writes whole shards.

With `--no-ray` the same functions run in a plain loop and write the same bytes.
"""

from functools import partial

from jobs.cluster.actor_pool import ray_session
from jobs.cluster.options import RayOptions
from jobs.cluster.paths import absolute
from jobs.cluster.progress import ProgressBars
from jobs.cluster.shard_workers import write_shards
from pipeline.build.build import CacheBuilder, build, finished
from pipeline.build.extend_records import RecordExtender, extend_records
from pipeline.build.extend_samples import CacheExtender, extend_samples
from pipeline.config.build import BuildConfig
from pipeline.config.extend import ExtendConfig
from pipeline.config.plugins import load_plugins
from teacher_cache.derive.sealed_cache import SealedCache, open_apart
from teacher_cache.schema.manifest import Seal
from teacher_cache.storage.open_store import open_store


def run_build(config: BuildConfig, options: RayOptions) -> Seal:
    """Build, or finish building, the cache of `config`; returns its seal."""
    config = absolute(config)
    load_plugins(config.plugin)  # here too: a missing one is named before workers start
    seal = finished(config)
    if seal is not None:
        return seal
    with ProgressBars() as bars:
        if not options.ray:
            return build(config, bars.update)
        with ray_session():
            make = partial(CacheBuilder, config)
            return write_shards(make, open_store(config.out), config.device, options, bars)


def run_extend(config: ExtendConfig, options: RayOptions) -> Seal:
    """Add samples or records to a cache, or go on doing so; returns the seal of the new cache."""
    config = absolute(config)
    load_plugins(config.plugin)
    by_samples = config.source is not None
    with ProgressBars() as bars:
        if not options.ray:
            extend = extend_samples if by_samples else extend_records
            return extend(config, bars.update)
        cache = open_apart(config.out, [SealedCache.open(config.cache)])
        with ray_session():
            make = partial(CacheExtender if by_samples else RecordExtender, config)
            return write_shards(make, cache, config.device, options, bars)
