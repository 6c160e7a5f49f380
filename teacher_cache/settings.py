"""The named alternatives of a cache, apart from everything heavy, so that settings load at once."""

from typing import Literal

RecordKind = Literal["topk", "topk+sketch", "hidden"]
"""The tiers of a cache: K largest logits; those and a PCA sketch; the final hidden states."""

ShardFormatName = Literal["arrow", "webdataset"]
