"""Defines the records that describe a cache (spec, plan, commits, seal) and compares them.

    plan.json            written once, before the teacher runs: the spec, and the samples of each
                         shard
    commits/<k>.json     created exclusively when shard k is complete: files, checksums, rows
    SEALED.json          created last, when every shard is committed; readers open only this

`CacheSpec` holds exactly the settings that change the stored numbers. The digest of the spec and
the keys is the cache's fingerprint. A mismatch is an error that lists field, stored and wanted
value. The file of a record begins with a checksum of the rest; a damaged or edited file is refused.
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
    EARLIER_PICTURE_RULE,
    EARLIER_TEXT_RULES,
    SETTING_PIECES,
    GridSettings,
    LogitsCodec,
    PictureRule,
    RecordKind,
    RecordSettings,
    ShardFormatName,
    TextRules,
    holds,
)
from teacher_cache.schema.samples import RejectedSample
from teacher_cache.schema.shard_quality import ShardQuality
from teacher_cache.schema.strict_json import StrictRecord, decode_json

LAYOUT_VERSION = 1
"""Raised whenever the bytes of a shard or the meaning of a field change."""


@dataclass(frozen=True, kw_only=True)  # without slots: its fingerprint is kept
class CacheSpec(StrictRecord):
    """Every setting that changes the numbers in a cache; digests are over content, not names."""

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
    """Digest of the calibrated PCA basis."""
    head_digest: str | None
    """Digest of the stored LM head; hidden tier only."""
    vocab_size: int
    """Rows of the LM head that the teacher's tokenizer can emit."""
    hidden_size: int
    logits_dtype: str
    """Dtype of the teacher's logits, and of stored logits unless `logits_codec` is affine8."""
    logits_codec: LogitsCodec | None
    """None for hidden. affine8 logits, int8 cosines and int8 states are read as float32."""
    logits_max_error: float | None
    """Largest error of a stored logit; None where logits are exact."""
    hidden_dtype: str | None
    hidden_group: int | None
    """Most channels that share a scale, where `hidden_dtype` is int8."""
    hidden_max_error: float | None
    """Largest error of an int8 state, as a share of the state's norm."""
    affinity_dtype: str | None
    affinity_max_error: float | None
    """Largest error of an int8 cosine."""
    teacher_class: str
    teacher_weights: str
    teacher_config: str
    compute_dtype: str
    attention: str
    tokenizer: str
    vocabulary: str
    """Digest of the token of each of the `vocab_size` ids; a student must agree."""
    chat_template: str
    image_processor: str
    """Digest of the image processor's class (backend included) and settings."""
    system_prompt: str | None
    batch_size: int
    """Samples of one forward pass; other sizes may change the last bits of a GPU's numbers."""
    share_vision: bool
    """Whether samples of a shard with equal tokens and images up to the last vision token share
    the vision record of the first. In another batch its last bits may differ."""
    grid: GridSettings | None = field(default=None, metadata=ABSENT)
    """How the teacher dropped vision tokens for further response records; None: no such records."""
    least_logits: bool = field(default=False, metadata=ABSENT)
    """Whether top-k records have each position's smallest log-probability."""
    template_digest: str | None = field(default=None, metadata=ABSENT)
    """Digest of the tail template; None for hidden, and in caches written before this field."""
    text: TextRules = field(default=EARLIER_TEXT_RULES, metadata=ABSENT)
    """How messages became tokens; absent: as in caches written before this field."""
    pictures: PictureRule = field(default=EARLIER_PICTURE_RULE, metadata=ABSENT)
    """How images became pictures; absent: as in caches written before this field."""
    plugins: tuple[str, ...] = field(default=(), metadata=ABSENT)
    """Name and digest of each module of the user's that was imported first."""

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ratios of the grid, ascending; none where there is no grid."""
        return () if self.grid is None else self.grid.ratios

    @property
    def settings(self) -> RecordSettings:
        """The settings of the records; unused ones have their defaults."""
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
    """The samples of each shard, fixed before the teacher sees any of them.

    `shards[k]` lists (key, position in the source) of shard k in order. `rejected` lists the
    samples that could not be read.
    """

    spec: CacheSpec
    format: ShardFormatName
    source: str
    """Where the samples were read from, for people; the keys are the identity."""
    shards: tuple[tuple[tuple[str, int], ...], ...]
    rejected: tuple[RejectedSample, ...] = ()

    @property
    def num_samples(self) -> int:
        """Planned samples, without rejected ones."""
        return sum(len(shard) for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the spec and the ordered keys of the shards, whatever the format."""
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
    """Fingerprint of the plan it was written under; equals `emkd.cache` in the file."""
    index: int
    """Number of the shard under that plan; equals `emkd.shard` in the file."""
    columns: tuple[str, ...]
    """Names of the columns that are read from this file, sorted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCommit(StrictRecord):
    """The record that completes shard `index`: its files and its rows.

    The first file holds samples and columns. Other files are layers: the same keys in the same
    order, without images, with further columns. A file may have been written for another cache.
    """

    index: int
    files: tuple[ShardFile, ...]
    num_rows: int
    num_vision_tokens: int
    num_response_tokens: int
    num_with_images: int
    """Rows that have vision tokens."""
    num_vision_records: int
    """Rows whose vision record is stored; other rows with vision tokens share one."""
    num_stored_vision_tokens: int
    rejected: tuple[RejectedSample, ...] = ()
    seconds: float = 0.0
    """Wall time of the committed attempt, for the report."""
    quality: ShardQuality | None = field(default=None, metadata=ABSENT)
    """Measured losses of the records; None where they were not measured."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal(StrictRecord):
    """A finished cache: its identity and every shard's commit record, in shard order."""

    fingerprint: str
    """The cache's identity: `cache_fingerprint` of its keys, without rejected ones."""
    plan: str
    """Fingerprint of the plan, rejected keys included."""
    spec: CacheSpec
    format: ShardFormatName
    source: str
    shards: tuple[ShardCommit, ...]
    rejected: tuple[RejectedSample, ...]

    @property
    def num_samples(self) -> int:
        """Rows of all shards."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def samples_per_vision_record(self) -> float:
        """Samples with images per stored vision record; 1 where nothing is shared."""
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
    """The file of a record: `to_json`, with `check`, the SHA-256 of the fields, before them."""
    fields = to_json(record).encode().removeprefix(b"{\n")
    return b'{\n "check": "%s",\n' % hashlib.sha256(fields).hexdigest().encode() + fields


def read_record(kind: type[R], data: bytes, where: str) -> R:
    """The inverse of `record_bytes`; `where` (a file name) opens the error messages.

    Raises `DecodeError` unless every byte is the one that was written.
    """
    found = _FIRST_LINES.match(data)
    if found is None or hashlib.sha256(data[found.end() :]).hexdigest().encode() != found[1]:
        raise DecodeError(
            f"{where} is not the {kind.__name__} that was written: its check does not match the "
            "rest, so it was damaged, torn or edited. Restore it from a copy. Without a copy: "
            "delete a commit record or a seal and run the same emkd build again; without its plan "
            "a cache must be built anew"
        )
    return decode_json(kind, b"{\n" + data[found.end() :], where)
