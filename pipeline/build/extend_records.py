"""Adds new kinds of records to the samples of a sealed cache, as a new cache of layered shards.

The teacher runs over the images and messages in the cache, in the batches of its build, so the new
columns are those that a build of all records would have written. They lie in a second file beside
each old one, which is linked or copied unopened; the old cache stays valid. Refuses another
teacher, samples that it rejects, records that the cache has, and settings of records that are not
new. Running it again resumes it.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import get_args

import torch

from pipeline.build.shard_builder import build_all
from pipeline.build.teacher_identity import load_as, require_same_teacher
from pipeline.config.build import QUALITY_SAMPLES
from pipeline.config.extend import ExtendConfig
from pipeline.config.plugins import load_plugins
from pipeline.fidelity.shard_quality import measure_shard
from pipeline.sources.source import refuse_samples
from pipeline.sources.tried import positions_to_try
from teacher_cache.codec.columns import columns_of
from teacher_cache.derive.derive import adopt_file, begin
from teacher_cache.derive.sealed_cache import SealedCache, open_apart
from teacher_cache.folder.layout import (
    SKETCH_FILE,
    TEMPLATE_FILE,
    read_commit,
    read_plan,
    read_sketch,
    read_template,
    shard_keys,
)
from teacher_cache.folder.shard_plan import spread_order
from teacher_cache.folder.writer import commit_shard, write_shard_file
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.manifest import CacheSpec, Plan, Seal, ShardCommit
from teacher_cache.schema.options import SETTING_PIECES, RecordKind, RecordSettings, holds
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.schema.samples import Sample
from teacher_cache.schema.teacher_output import CachedSample, TeacherOutput
from teacher_cache.shards.encoded_row import EncodedRow
from teacher_cache.shards.rows import encode_rows, tier_parts
from teacher_cache.storage.store import Store
from teacher_cache.teacher.teacher import Teacher
from teacher_cache.teacher.vision_sharing import VisionOwners


class RecordExtender:
    """Computes the new columns of one cache, shard by shard."""

    def __init__(self, config: ExtendConfig, progress: Progress = no_progress) -> None:
        self.config = config
        self.progress = progress
        self._plugins = load_plugins(config.plugin)
        if config.torch_threads is not None:
            torch.set_num_threads(config.torch_threads)
        self.base = SealedCache.open(config.cache)
        self.cache: Store = open_apart(config.out, [self.base])
        if config.settings is None:
            raise ValueError("new records need settings")
        records, self._computed = joined(self.base.spec.records, config.settings.records)
        self.settings = _settings(config.settings, self.base.spec, records)

    @cached_property
    def teacher(self) -> Teacher:
        """The base's teacher with the sketch basis and template to use, loaded on first use."""
        teacher = load_as(
            self.config.teacher, self.base.spec, self.config.device, self._samples_to_try()
        )
        teacher.plugins = self._plugins
        require_same_teacher(self.base.spec, teacher, self.config.teacher)
        self._load_assets(teacher)
        return teacher

    @cached_property
    def plan(self) -> Plan:
        """The base's plan with the spec of all records."""
        base = self.base.spec
        spec = self.teacher.spec(
            self.settings, batch_size=base.batch_size, share_vision=base.share_vision
        )
        return dataclasses.replace(self.base.plan, spec=spec)

    def prepare(self, unreadable: Sequence[int] = (), crashing: Sequence[int] = ()) -> Plan:
        """Write the plan, or check that the existing plan matches the settings."""
        if crashing:
            self._refuse_crashing([self.base.reader.keys[row] for row in crashing])
        head = self.teacher.head if holds(self.plan.spec.records, "hidden") else None
        sketch = self.teacher.sketch if self.plan.spec.sketch_digest is not None else None
        template = self.teacher.template if self.plan.spec.template_digest is not None else None
        assets = TeacherAssets(head=head, sketch=sketch, template=template)
        begin(self.cache, self.plan, assets)
        return self.plan

    def build_shard(self, index: int, crashing: Sequence[int] = ()) -> ShardCommit:
        """Adopt the files of a shard, write the new columns beside them, and commit it."""
        done = read_commit(self.cache, index)
        if done is not None:
            return done
        commit = self.base.seal.shards[index]
        if crashing:
            self._refuse_crashing(
                [self.base.plan.shards[index][position][0] for position in crashing]
            )
        cached = self._cached(index)
        quality = commit.quality
        if self._computed != "hidden":  # top-k records or a sketch are new
            quality = measure_shard(self.teacher, cached, self._new_spec, QUALITY_SAMPLES)
        layer = write_shard_file(
            self.cache, self.plan, index, self._rows(cached), self._new_columns, commit.rejected
        )
        old = [adopt_file(self.base, file, self.cache, self.plan, index) for file in commit.files]
        files = (*old, layer)
        changed = dataclasses.replace(commit, files=files, quality=quality)
        return commit_shard(self.cache, self.plan, changed)

    def probe(self, index: int, start: int, stop: int) -> None:
        """Run the teacher over samples start ... stop - 1 of a shard and keep nothing."""
        for samples in self._batches(index, start, stop):
            self.teacher.outputs(samples, self._new_settings)
            self.progress(f"probe of shard {index}", start, stop)

    def num_to_read(self) -> int:
        """None: there is no source."""
        return 0

    def read_only(self, positions: Sequence[int]) -> None:
        """Nothing is read: there is no source."""

    def calibration_order(self, unreadable: Sequence[int]) -> tuple[list[int], int | None]:
        """Rows of the base in the order of calibration, and the tokens that it takes."""
        tried = positions_to_try(len(self.base.reader))
        return list(dict.fromkeys([*tried, *self._order()])), self.settings.calibration_tokens

    def run_over(self, positions: Sequence[int]) -> int:
        """Load the teacher, run it over these rows and keep nothing; returns their tokens."""
        num_tokens, size = 0, self.base.spec.batch_size
        samples = self._of_calibration(positions)
        for batch in iter(lambda: list(islice(samples, size)), []):
            num_tokens += self._bare_teacher.run_over(batch)
            self.progress("search", num_tokens, num_tokens + 1)
        return num_tokens

    @cached_property
    def _bare_teacher(self) -> Teacher:
        return load_as(self.config.teacher, self.base.spec, self.config.device)

    def _refuse_crashing(self, keys: Sequence[str]) -> None:
        raise ValueError(
            f"samples {', '.join(keys)} of {self.base.store} crash the worker that computes "
            "their new records; remove them with emkd subset first"
        )

    @property
    def _new_columns(self) -> frozenset[str]:
        new, held = (columns_of(tier_parts(s), s) for s in (self.plan.spec, self.base.spec))
        return new - held

    @property
    def _new_settings(self) -> RecordSettings:
        return dataclasses.replace(self.settings, records=self._computed)

    @property
    def _new_spec(self) -> CacheSpec:
        return dataclasses.replace(self.plan.spec, records=self._computed)

    def _cached(self, index: int) -> list[CachedSample]:
        """The samples of a shard with their new records."""
        owners: VisionOwners | None = {} if self.base.spec.share_vision else None
        cached: list[CachedSample] = []
        for samples in self._batches(index):
            outputs = self.teacher.outputs(samples, self._new_settings, owners)
            for sample, output in zip(samples, outputs, strict=True):
                if not isinstance(output, TeacherOutput):
                    raise ValueError(
                        f"sample {sample.key} ({sample.source_id}) is in {self.base.store}, but "
                        f"the teacher gives no new records for it: {output.reason}; remove it "
                        "with emkd subset first"
                    )
                cached.append(CachedSample(sample=sample, output=output))
            self.progress(f"shard {index}", len(cached), len(self.base.plan.shards[index]))
        return cached

    def _rows(self, cached: Sequence[CachedSample]) -> Iterator[EncodedRow]:
        """These samples with the new columns only."""
        for row in encode_rows(cached, self._new_spec):
            columns = {name: row.frames[name] for name in self._new_columns}
            yield dataclasses.replace(row, images=(), frames=columns)

    def _batches(
        self, index: int, first: int = 0, last: int | None = None
    ) -> Iterator[list[Sample]]:
        """The batches in which the build ran the teacher over a shard, without rejected samples."""
        planned = [key for key, _ in self.base.plan.shards[index]][first:last]
        kept = set(shard_keys(self.base.plan, self.base.seal.shards[index]))
        size = self.base.spec.batch_size
        for start in range(0, len(planned), size):
            keys = [key for key in planned[start : start + size] if key in kept]
            if keys:
                yield [self._sample(key) for key in keys]

    def _sample(self, key: str) -> Sample:
        return self.base.reader.read(self.base.reader.find(key), ()).sample

    def _samples_to_try(self) -> Iterator[Sample]:
        for row in positions_to_try(len(self.base.reader)):
            yield self.base.reader.read(row, ()).sample

    def _load_assets(self, teacher: Teacher) -> None:
        """Set basis and template: the base's own, those of an earlier run, or fitted now."""
        held, wanted = self.base.spec.records, self.settings.records
        new = [name for name in ("topk", "sketch") if holds(wanted, name) and not holds(held, name)]
        if new and not self._load_begun(teacher):
            self._calibrate(teacher)
        if "topk" not in new:
            teacher.template = read_template(self.base.store, self.base.spec)
        if "sketch" not in new:
            teacher.sketch = read_sketch(self.base.store, self.base.spec)

    def _load_begun(self, teacher: Teacher) -> bool:
        """Take basis and template of an earlier run; False if it left none."""
        begun = read_plan(self.cache)
        if begun is None:
            return False
        sketched, shaped = begun.spec.sketch_digest, begun.spec.template_digest
        files = {SKETCH_FILE: sketched, TEMPLATE_FILE: shaped}
        if not all(self.cache.exists(name) for name, digest in files.items() if digest is not None):
            return False
        teacher.sketch = read_sketch(self.cache, begun.spec)
        teacher.template = read_template(self.cache, begun.spec)
        return True

    def _order(self) -> Iterator[int]:
        """Rows of the base in the order in which a build would have calibrated."""
        kept = [pair for commit in self.base.seal.shards for pair in self.base.kept(commit)]
        order = sorted(range(len(kept)), key=lambda row: kept[row][1])
        return (order[position] for position in spread_order(len(order)))

    def _of_calibration(self, rows: Iterable[int]) -> Iterator[Sample]:
        """The samples of these rows, those with images if the base has any."""
        samples = (self.base.reader.read(row, ()).sample for row in rows)
        if any(commit.num_with_images for commit in self.base.seal.shards):
            return (sample for sample in samples if sample.images)
        return samples

    def _calibrate(self, teacher: Teacher) -> None:
        """Fit basis and template to the samples that a build would have taken, in its batches."""
        samples = self._of_calibration(self._order())
        batches = iter(lambda: list(islice(samples, self.base.spec.batch_size)), [])
        rejected = teacher.calibrate(
            batches, self.settings, self.settings.calibration_tokens, self.progress
        )
        refuse_samples(
            str(self.base.store),
            [f"{each.source_id}: {each.reason}" for each in rejected],
            "Remove them with emkd subset first.",
        )


def joined(held: RecordKind, wanted: RecordKind) -> tuple[RecordKind, RecordKind]:
    """What a cache holds when `wanted` is added, and what must be computed for it.

    A sketch is computed together with top-k records, to which its shift belongs. ValueError if
    nothing is new.
    """
    pieces: set[str] = set(wanted.split("+"))
    known: set[str] = set(held.split("+"))
    new = pieces - known
    if not new:
        raise ValueError(
            f"the cache holds {held}, and {wanted} adds nothing; name records that it lacks"
        )
    computed = new | ({"topk"} if "sketch" in new else set())
    return _kind(pieces | known), _kind(computed)


def extend_records(config: ExtendConfig, progress: Progress = no_progress) -> Seal:
    """Write a cache with further records of its samples as a new cache, in this process."""
    extender = RecordExtender(config, progress)
    return build_all(extender, extender.cache)


def _kind(pieces: set[str]) -> RecordKind:
    return next(kind for kind in get_args(RecordKind) if set(kind.split("+")) == pieces)


def _settings(wanted: RecordSettings, base: CacheSpec, records: RecordKind) -> RecordSettings:
    """The base's settings for the pieces that it holds, the wanted ones for new pieces.

    ValueError for a wanted setting of a piece that is not new, or that is not used.
    """
    new = set(records.split("+")) - set(base.records.split("+"))
    chosen: dict[str, object] = {"records": records}
    for name, pieces in SETTING_PIECES.items():
        if new.intersection(pieces):
            chosen[name] = getattr(wanted, name)
        elif name in wanted.changed:
            raise ValueError(
                f"{name} is given, but {' or '.join(pieces)} records are not new: the cache holds "
                f"{base.records}, and {records} are wanted"
            )
    settings = dataclasses.replace(base.settings, **chosen)
    settings.refuse_unused()
    return settings
