"""Looks up shard formats by name."""

from teacher_cache.schema.options import ShardFormatName
from teacher_cache.shards.shard import ShardFormat


def shard_format(name: ShardFormatName) -> ShardFormat:
    """The format of that name; imports its module only then, so one format's library is enough."""
    if name == "arrow":
        from teacher_cache.shards.arrow import ArrowFormat

        return ArrowFormat()
    from teacher_cache.shards.webdataset import WebDatasetFormat

    return WebDatasetFormat()
