"""What a cache says about itself: spec, plan, commit records, seal, and how two are compared.

    plan.json            written once, before any teacher work: the spec, and which samples make
                         up which shard
    commits/<k>.json     created exclusively when shard k is complete: files, checksums, rows
    SEALED.json          created last, when every shard is committed; the only entry for readers

`CacheSpec` holds every setting that changes the stored numbers, and nothing else: its digest with
the keys that are in it is the cache's fingerprint. Disagreement is an error that lists field,
stored and wanted value. The file of a record begins with a checksum of the rest: what was damaged,
torn or edited is refused. This module knows types and texts, no folders.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import ClassVar, TypeVar

from teacher_cache.schema.errors import CacheMismatchError, DecodeError
from teacher_cache.schema.fingerprint import ABSENT, canonical, digest_json, short
from teacher_cache.schema.options import (
    SETTING_PIECES,
    GridSettings,
    LogitsCodec,
    RecordKind,
    RecordSettings,
    ShardFormatName,
    holds,
)
from teacher_cache.schema.samples import RejectedSample
from teacher_cache.schema.shard_quality import ShardQuality
from teacher_cache.schema.strict_json import StrictRecord, decode_json

LAYOUT_VERSION = 1
"""Raised whenever the bytes of a shard or the meaning of a field change."""


@dataclass(frozen=True, kw_only=True)  # without slots: its fingerprint is kept
class CacheSpec(StrictRecord):
    """Every setting that changes the numbers in a cache. Digests are over content, not names."""

    stored_names: ClassVar[Mapping[str, str]] = {"top_p": "top_mass", "min_k": "top_k_floor"}

    layout_version: int
    records: RecordKind
    top_k: int | None
    """Kept entries per position; with `top_p`, the maximum; None for hidden."""
    top_p: float | None
    """Positions keep the fewest entries whose probabilities sum to this; None: all keep `top_k`."""
    min_k: int | None
    """Fewest entries of a position where `top_p` is set."""
    sketch_rank: int | None
    sketch_digest: str | None
    """Content of the calibrated PCA basis."""
    head_digest: str | None
    """Content of the stored LM head; hidden tier only."""
    vocab_size: int
    """Rows of the LM head that the teacher and its tokenizer share with students."""
    hidden_size: int
    logits_dtype: str
    """Of the teacher's logits, and of the stored ones unless `logits_codec` is affine8."""
    logits_codec: LogitsCodec | None
    """None for hidden. What is stored as affine8 is read as float32; so are int8 cosines and
    states."""
    logits_max_error: float | None
    """No logit of the cache is further from the teacher's; None where they are exact."""
    hidden_dtype: str | None
    hidden_group: int | None
    """Most channels that share a scale, where `hidden_dtype` is int8."""
    hidden_max_error: float | None
    """No int8 state of the cache is further from the teacher's, as a share of its length."""
    affinity_dtype: str | None
    affinity_max_error: float | None
    """No int8 cosine of the cache is further from the teacher's."""
    teacher_class: str
    teacher_weights: str
    teacher_config: str
    compute_dtype: str
    attention: str
    tokenizer: str
    vocabulary: str
    """Which token each of the `vocab_size` ids stands for; a student must agree."""
    chat_template: str
    image_processor: str
    """Class (backend included) and settings of the image processor, as one digest."""
    system_prompt: str | None
    batch_size: int
    """Samples of one forward pass; other sizes may change the last bits of a GPU's numbers."""
    share_vision: bool
    """Whether samples of a shard that are the same up to their last vision token have one vision
    record, that of the first; computed beside other samples its last bits may differ."""
    grid: GridSettings | None = field(default=None, metadata=ABSENT)
    """How the teacher dropped vision tokens for further response records; None: there are none."""
    least_logits: bool = field(default=False, metadata=ABSENT)
    """Whether top-k records have the log-probability of each position's least likely entry."""
    template_digest: str | None = field(default=None, metadata=ABSENT)
    """Content of the template of the tails; None for hidden, and for caches of an earlier day."""

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ratios of the grid, ascending; none where there is no grid."""
        return () if self.grid is None else self.grid.ratios

    @property
    def settings(self) -> RecordSettings:
        """The settings that the records were made with; those not used have their defaults."""
        names = {each.name for each in fields(self)} & {*SETTING_PIECES, "records", "grid"}
        if not holds(self.records, "topk"):
            names.remove("least_logits")
        found = {name: getattr(self, name) for name in names}
        return RecordSettings(**{name: value for name, value in found.items() if value is not None})

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits over every field."""
        return digest_json(self)

    def __repr__(self) -> str:
        return f"CacheSpec({short(self.fingerprint)}, {self.records}, V={self.vocab_size})"


@dataclass(frozen=True, kw_only=True)  # without slots: its fingerprint is kept
class Plan(StrictRecord):
    """Which samples make up which shard, fixed before the teacher sees any of them.

    `shards[k]` lists (key, position in the source) of shard k in order. `rejected` lists the
    samples that could not even be read.
    """

    spec: CacheSpec
    format: ShardFormatName
    source: str
    """What the samples were read from, for people; identity is in the keys."""
    shards: tuple[tuple[tuple[str, int], ...], ...]
    rejected: tuple[RejectedSample, ...] = ()

    @property
    def num_samples(self) -> int:
        """Samples that were planned, the rejected ones not counted."""
        return sum(len(shard) for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """What is planned: the spec and the ordered keys of the shards (not the format)."""
        return cache_fingerprint(self.spec, [[key for key, _ in shard] for shard in self.shards])

    def __repr__(self) -> str:
        return f"Plan({short(self.fingerprint)}, {self.num_samples} in {len(self.shards)} shards)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile(StrictRecord):
    """One file of a shard: its size, its checksum, the cache it was written for, its columns."""

    stored_names: ClassVar[Mapping[str, str]] = {"columns": "planes"}

    file: str
    """Path relative to the cache folder."""
    num_bytes: int
    sha256: str
    cache: str
    """Fingerprint of the plan that it was written under; says `emkd.cache` in the file."""
    index: int
    """Number of the shard under that plan; says `emkd.shard` in the file."""
    columns: tuple[str, ...]
    """Names of the columns that are read from this file, sorted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCommit(StrictRecord):
    """The record that makes shard `index` exist: its files, its rows.

    The first file holds samples and columns. Others are layers: the same keys in the same order,
    without images, with further columns. A file may have been written for another cache.
    """

    index: int
    files: tuple[ShardFile, ...]
    num_rows: int
    num_vision_tokens: int
    num_response_tokens: int
    num_with_images: int
    """Rows that have vision tokens."""
    num_vision_records: int
    """Those of them whose vision record is stored; the others share one (`CacheSpec`)."""
    num_stored_vision_tokens: int
    rejected: tuple[RejectedSample, ...] = ()
    seconds: float = 0.0
    """Wall time of the attempt that was committed, for the report."""
    quality: ShardQuality | None = field(default=None, metadata=ABSENT)
    """What its records lose of the teacher; None where nobody has measured that of these rows."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal(StrictRecord):
    """A finished cache: its identity and every shard's commit record, in shard order."""

    fingerprint: str
    """The cache's identity: `cache_fingerprint` of the keys that are in it, rejected ones not."""
    plan: str
    """Fingerprint of the plan, whatever was rejected."""
    spec: CacheSpec
    format: ShardFormatName
    source: str
    shards: tuple[ShardCommit, ...]
    rejected: tuple[RejectedSample, ...]

    @property
    def num_samples(self) -> int:
        """Rows that readers will see."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def samples_per_vision_record(self) -> float:
        """Samples with images for each stored vision record; 1 where nothing is shared."""
        records = sum(shard.num_vision_records for shard in self.shards)
        return sum(shard.num_with_images for shard in self.shards) / records if records else 1.0

    def __repr__(self) -> str:
        return f"Seal({short(self.fingerprint)}, {self.num_samples} in {len(self.shards)} shards)"


def cache_fingerprint(spec: CacheSpec, keys: Sequence[Sequence[str]]) -> str:
    """64 hex digits over a spec and the ordered keys of each shard, whatever the format."""
    return digest_json({"spec": spec.fingerprint, "keys": keys})


def differences(stored: object, wanted: object, prefix: str = "") -> list[tuple[str, str, str]]:
    """List (field, stored value, wanted value) where two records of one type differ."""
    if type(stored) is type(wanted) and dataclasses.is_dataclass(stored):
        return [
            row
            for f in dataclasses.fields(stored)
            for row in differences(
                getattr(stored, f.name), getattr(wanted, f.name), f"{prefix}{f.name}."
            )
        ]
    if stored == wanted:
        return []
    return [(prefix.rstrip("."), _brief(stored), _brief(wanted))]


def require_equal(stored: object, wanted: object, what: str, remedy: str) -> None:
    """Raise `CacheMismatchError` with a table of differing fields unless the records are equal."""
    rows = differences(stored, wanted)
    if rows:
        table = "\n".join(f"  {field}: stored {have}, wanted {want}" for field, have, want in rows)
        raise CacheMismatchError(f"{what} differs:\n{table}\n{remedy}")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def to_json(record: CacheSpec | Plan | ShardCommit | Seal) -> str:
    """Canonical text of a record: sorted keys, one trailing newline; equal records, equal bytes."""
    return json.dumps(canonical(record), sort_keys=True, indent=1) + "\n"


R = TypeVar("R", Plan, ShardCommit, Seal)

_FIRST_LINES = re.compile(rb'\{\n "check": "([0-9a-f]{64})",\n')


def record_bytes(record: Plan | ShardCommit | Seal) -> bytes:
    """The file of a record: `to_json`, before whose fields stands `check`, the SHA-256 of them."""
    fields = to_json(record).encode().removeprefix(b"{\n")
    return b'{\n "check": "%s",\n' % hashlib.sha256(fields).hexdigest().encode() + fields


def read_record(kind: type[R], data: bytes, where: str) -> R:
    """The inverse of `record_bytes`; `where` (a file name) opens the error messages.

    Raises `DecodeError` unless every byte is the one that was written.
    """
    found = _FIRST_LINES.match(data)
    if found is None or hashlib.sha256(data[found.end() :]).hexdigest().encode() != found[1]:
        raise DecodeError(
            f"{where} is not the {kind.__name__} that was written: its check does not fit the "
            "rest, so it was damaged, torn or edited. Restore it from a copy; where there is "
            "none, a commit record or a seal may be deleted and the same emkd build run again, "
            "and without its plan a cache must be built anew"
        )
    return decode_json(kind, b"{\n" + data[found.end() :], where)
