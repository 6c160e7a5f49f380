"""Reads a shard whose columns lie in several files (layers) as one shard.

A row is the same sample in every layer that is read for it: key, source id, messages and owner are
compared. The bytes of each layer pass the checks of that layer. Layers without a wanted column are
not read. Refuses layers with other numbers of rows or other keys.
"""

import dataclasses
from collections.abc import Collection, Sequence

from teacher_cache.schema.errors import ShardCorruptError
from teacher_cache.shards.encoded_row import EncodedRow, StoredRow
from teacher_cache.shards.shard import Shard


class LayeredShard(Shard):
    """Several open shards with the same rows; the first holds the images."""

    def __init__(self, layers: Sequence[Shard], columns: Sequence[Collection[str]]) -> None:
        """`columns[n]` are the names of the columns that are read from `layers[n]`."""
        base = self._base = layers[0]
        super().__init__(base.path, base.metadata, base.num_rows)
        self._further = list(zip(layers[1:], map(frozenset, columns[1:]), strict=True))
        for layer, _ in self._further:
            if layer.num_rows != base.num_rows:
                raise ShardCorruptError(
                    f"{layer.path} has {layer.num_rows} rows, {base.path} has {base.num_rows}: "
                    "they are not layers of one shard"
                )

    def _fetch(self, row: int, columns: Collection[str]) -> StoredRow:
        return self._base._fetch(row, columns)

    def read(self, row: int, columns: Collection[str]) -> EncodedRow:
        """Row `row` with the given columns only; every byte returned has been checked."""
        wanted = [(layer, names.intersection(columns)) for layer, names in self._further]
        elsewhere = frozenset[str]().union(*(names for _, names in wanted))
        found = self._base.read(row, set(columns) - elsewhere)
        frames = dict(found.frames)
        for layer, names in wanted:
            if names:
                frames.update(self._same_row(layer, row, names, found).frames)
        return dataclasses.replace(found, frames=frames)

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of the frames of each column, and of `images`, in the layer that has them."""
        found = self._base.stored_bytes()
        for layer, names in self._further:
            sizes = layer.stored_bytes()
            found.update({name: sizes.get(name, 0) for name in names})
        return found

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all rows, in order, which are those of every layer."""
        keys: list[str] = []
        for row in range(self.num_rows):
            found = self._base.read(row, ())
            for layer, _ in self._further:
                self._same_row(layer, row, (), found)
            keys.append(found.key)
        return tuple(keys)

    def _same_row(
        self, layer: Shard, row: int, columns: Collection[str], base: EncodedRow
    ) -> EncodedRow:
        found = layer.read(row, columns)
        for name in ("key", "source_id", "messages", "shared_from"):
            if getattr(found, name) != getattr(base, name):
                raise ShardCorruptError(
                    f"{layer.path}: row {row} is sample {found.key}, {self.path} has {base.key} "
                    f"there, with another {name}"
                )
        return found
