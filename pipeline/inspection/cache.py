"""Describes a cache for `emkd inspect`: its seal, where its bytes are, its images, tail masses.

Counts and settings are the seal's; bytes of each part are those of the shards' frames. Counts of
images that need a conversion, and tail masses, come from a bounded, seeded sample of rows that have
passed the reader's checks, so that memory is bounded for a cache of any size. Beside them is what
the build measured (cache_quality.py). Everything is plain data (numbers, strings, lists), ready for
JSON; `render` lays it out for a terminal.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import yaml
from torch import Tensor

from pipeline.fidelity.cache_quality import summarise
from pipeline.inspection.compare_outputs import top_k_by_name
from teacher_cache.codec.columns import PART_COLUMNS, Part
from teacher_cache.encoding.pictures import PictureTraits, picture_traits
from teacher_cache.folder.layout import open_shard, require_plan
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.shard_quality import quantile

MAX_WORD = 20
"""Longest word, in characters, of a list that is written on one line."""
QUANTILES = (0.1, 0.5, 0.9, 0.99, 1.0)
_TAILED: frozenset[Part] = frozenset({"vision", "response", "response_grid"})


def describe_cache(
    reader: CacheReader, num_rows: int = 256, num_shards: int = 16
) -> dict[str, Any]:
    """A cache's counts, bytes, settings and rejected samples.

    `num_rows` bounds the rows whose tail masses and images are read; `num_shards` the shards that
    are fetched of a cache in an object store.
    """
    seal = reader.seal
    indices = list(range(len(seal.shards)))
    if not reader.cache.in_place:
        indices = sorted(random.Random(0).sample(indices, min(num_shards, len(indices))))
    rows = _sampled_rows(reader, indices, num_rows)
    num_vision = sum(shard.num_vision_tokens for shard in seal.shards)
    quality = summarise(seal)
    return {
        "cache": str(reader.cache),
        "fingerprint": seal.fingerprint,
        "source": seal.source,
        "format": seal.format,
        "samples": seal.num_samples,
        "shards": len(seal.shards),
        "bytes": seal.num_bytes,
        "samples_with_images": sum(shard.num_with_images for shard in seal.shards),
        "vision_records": sum(shard.num_vision_records for shard in seal.shards),
        "samples_per_vision_record": round(seal.samples_per_vision_record, 2),
        "vision_tokens": num_vision,
        "response_tokens": sum(shard.num_response_tokens for shard in seal.shards),
        "bytes_per_vision_token": round(seal.num_bytes / num_vision, 1) if num_vision else None,
        "build_seconds": round(sum(shard.seconds for shard in seal.shards), 1),
        "bytes_of_parts": _bytes_of_parts(reader, indices),
        "pictures": _pictures(reader, rows),
        "tail_mass": _tail_mass(reader, rows),
        "quality": None if quality is None else dataclasses.asdict(quality),
        "spec": dataclasses.asdict(seal.spec),
        "rejected": [dataclasses.asdict(rejected) for rejected in seal.rejected],
    }


def _bytes_of_parts(reader: CacheReader, indices: Sequence[int]) -> dict[str, int]:
    """The bytes of some shards: images, token spans, each part, and everything around them."""
    plan = require_plan(reader.cache)
    part_of = {column: part for part, columns in PART_COLUMNS.items() for column in columns}
    found = Counter[str]()
    whole = 0
    for index in indices:
        commit = reader.seal.shards[index]
        for column, num_bytes in open_shard(reader.cache, plan, commit).stored_bytes().items():
            found["images" if column == "images" else part_of.get(column, "tokens")] += num_bytes
        whole += commit.num_bytes
    return {
        "shards": len(indices),
        **dict(sorted(found.items())),
        "around": whole - found.total(),
    }


def _sampled_rows(reader: CacheReader, indices: Sequence[int], num_rows: int) -> list[int]:
    """Rows of some shards, ascending: all of them, or a seeded sample of `num_rows`."""
    starts = [0, *accumulate(reader.shard_sizes)]
    rows = [row for index in indices for row in range(starts[index], starts[index + 1])]
    return sorted(random.Random(0).sample(rows, min(num_rows, len(rows))))


def _pictures(reader: CacheReader, rows: Sequence[int]) -> dict[str, Any]:
    """The rule that images were read by, and how many images of these rows need a conversion."""
    found = Counter[str]()
    for row in rows:
        for data in reader.read(row, frozenset()).sample.images:
            found["images"] += 1
            try:
                traits = dataclasses.asdict(picture_traits(data))
            except ValueError:
                traits = {"unreadable": True}
            found.update(name for name, has in traits.items() if has)
    names = ["images", *(each.name for each in dataclasses.fields(PictureTraits)), "unreadable"]
    return {
        "rule": reader.spec.pictures,
        "rows": len(rows),
        **{name: found[name] for name in names},
    }


def _tail_mass(reader: CacheReader, rows: Sequence[int]) -> dict[str, Any] | None:
    """Quantiles of the probability outside the top-k, over some rows; None without k."""
    parts = _TAILED & reader.parts
    if not parts:
        return None
    tails: dict[str, list[Tensor]] = {}
    for row in rows:
        for name, record in top_k_by_name(reader.read(row, parts).output).items():
            tails.setdefault(name, []).append(record.log_tail.double().exp())
    quantiles = {name: _quantiles(torch.cat(each)) for name, each in tails.items()}
    return {"rows": len(rows), **quantiles}


def _quantiles(values: Tensor) -> dict[str, float] | None:
    if not len(values):
        return None
    ordered = values.sort().values
    return {f"{100 * share:g}%": quantile(ordered, share) for share in QUANTILES}


def render(described: Mapping[str, Any]) -> str:
    """Lay a description out as YAML; lists of numbers and of short words take one line."""
    text: str = yaml.dump(
        dict(described), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )
    return text.rstrip()


class _Dumper(yaml.SafeDumper):
    """Plain YAML; `_list` decides which lists take one line."""


def _list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=_is_short(value))


def _is_short(value: object) -> bool:
    if isinstance(value, list):
        return all(_is_short(item) for item in value)
    return not isinstance(value, dict) and len(str(value)) <= MAX_WORD


_Dumper.add_representer(list, _list)
