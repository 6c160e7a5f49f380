"""The shard formats by name."""

from teacher_cache.schema.options import ShardFormatName
from teacher_cache.shards.shard import ShardFormat


def shard_format(name: ShardFormatName) -> ShardFormat:
    """The format of that name. Imports lazily: a reader of one never loads the other's library."""
    if name == "arrow":
        from teacher_cache.shards.arrow import ArrowFormat

        return ArrowFormat()
    from teacher_cache.shards.webdataset import WebDatasetFormat

    return WebDatasetFormat()
