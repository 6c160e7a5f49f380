"""Builds a sealed cache from a source and a teacher. Knows nothing of Ray.

A plan, written before the teacher runs, cuts the samples into shards. Any process may run
`build_shard` any number of times, in any order: the shards hold the same bytes. To resume, run the
same command again (resume.py). Refuses a cache begun with other settings, another teacher or other
samples, and names the fields that differ. A bad sample is named, never silently dropped.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import islice

import torch

from pipeline.build.response_grid import require_compressor, with_grid
from pipeline.build.resume import is_unchanged, keep_settings, require_same_quality_samples
from pipeline.build.shard_builder import build_all
from pipeline.config.build import BuildConfig
from pipeline.config.plugins import load_plugins
from pipeline.fidelity.shard_quality import measure_shard
from pipeline.sources.crashing import (
    CRASHED,
    WithoutCrashing,
    crashed_before,
    source_id_at,
)
from pipeline.sources.source import SampleSource, ScannedSample, open_source, refuse_samples, scan
from pipeline.sources.tried import positions_to_try, samples_to_try
from teacher_cache.encoding.chat_template import text_rules
from teacher_cache.folder.layout import (
    read_commit,
    read_plan,
    read_seal,
    read_sketch,
    read_template,
    require_plan,
)
from teacher_cache.folder.shard_plan import group_shards, spread_order
from teacher_cache.folder.writer import write_assets, write_plan, write_shard
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.manifest import CacheSpec, Plan, Seal, ShardCommit
from teacher_cache.schema.options import (
    EARLIER_TEXT_RULES,
    PICTURE_RULE,
    PictureRule,
    TextRules,
    holds,
)
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.schema.samples import RejectedSample, Sample
from teacher_cache.schema.teacher_output import CachedSample, TeacherOutput
from teacher_cache.shards.rows import content_key
from teacher_cache.storage.open_store import open_store
from teacher_cache.storage.store import Store
from teacher_cache.teacher.teacher import Teacher
from teacher_cache.teacher.vision_sharing import VisionOwners


class CacheBuilder:
    """One worker of the build: holds teacher and source, writes the plan, builds shards.

    A plain class: `jobs/cluster/shard_workers.py` makes Ray actors of it, tests call it directly.
    """

    def __init__(self, config: BuildConfig, progress: Progress = no_progress) -> None:
        self.config = config
        self.progress = progress
        self._tries_samples = True
        self.plugins = load_plugins(config.plugin)
        if config.torch_threads is not None:
            torch.set_num_threads(config.torch_threads)

    @cached_property
    def cache(self) -> Store:
        """Where the cache is written."""
        return open_store(self.config.out)

    @cached_property
    def source(self) -> SampleSource:
        """The samples, opened on first use, without those that crashed when a plan was made."""
        source, crashed = open_source(self.config.source), self._crashed_before()
        return WithoutCrashing(source, crashed) if crashed else source

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher, loaded on first use."""
        config = self.config
        require_compressor(config.settings.grid)
        teacher = Teacher.load(
            config.teacher,
            device=config.device,
            dtype=config.dtype,
            attention=config.attention,
            system_prompt=config.system_prompt,
            text=self.text_rules(),
            pictures=self.picture_rule(),
            samples=samples_to_try(self.source) if self._tries_samples else (),
        )
        teacher.plugins = self.plugins
        return with_grid(teacher, config.settings.grid)

    def text_rules(self) -> TextRules:
        """The settings' rules; those of earlier caches where such a build was begun."""
        config, begun = self.config, read_plan(self.cache)
        if begun is not None and begun.spec.text == EARLIER_TEXT_RULES and not config.chat_template:
            return EARLIER_TEXT_RULES
        return text_rules(config.append_eos, config.chat_template)

    def picture_rule(self) -> PictureRule:
        """Today's rule; that of the plan where a build was begun."""
        begun = read_plan(self.cache)
        return PICTURE_RULE if begun is None else begun.spec.pictures

    def prepare(self, unreadable: Sequence[int] = (), crashing: Sequence[int] = ()) -> Plan:
        """Write the plan, or check that the existing plan matches the settings.

        Reads every sample once (keys are content digests) and calibrates what top-k records share.
        Skips both if settings, source files and teacher files have not changed. Samples that crash
        their worker when they are read (`unreadable`) or run over (`crashing`) are rejected.
        """
        config, cache = self.config, self.cache
        cache.require_writable()  # fails here, not after hours
        begun = read_plan(cache)
        if begun is not None and is_unchanged(config):
            self._load_assets(begun)
            return begun
        require_same_quality_samples(config)
        self._leave_out(unreadable, crashing)
        _ = self.teacher  # refuses what cannot be loaded or used before the source is read
        scanned, rejected = scan(self.source, self.progress)
        self._refuse(rejected)
        if not scanned:
            raise ValueError(f"{config.source.path}: no usable sample, nothing to build")
        if holds(config.settings.records, "topk"):
            self._calibrate(scanned)
        plan = Plan(
            spec=self._spec(),
            format=config.format,
            source=config.source.path,
            shards=self._shards(scanned),
            rejected=tuple(rejected),
        )
        write_plan(cache, plan)
        teacher = self.teacher
        head = teacher.head if holds(config.settings.records, "hidden") else None
        assets = TeacherAssets(head=head, sketch=teacher.sketch, template=teacher.template)
        write_assets(cache, assets)
        keep_settings(config)
        return plan

    def build_shard(self, index: int, crashing: Sequence[int] = ()) -> ShardCommit:
        """Run the teacher over shard `index` of the plan and commit it; returns the commit record.

        `crashing` are the positions in the shard of samples that crash their worker. Raises
        ValueError for a sample that cannot be used, unless the settings say to record it.
        """
        done = read_commit(self.cache, index)
        if done is not None:
            return done
        plan, started = self._plan, time.monotonic()
        rows: list[CachedSample] = []
        shard = plan.shards[index]
        rejected = [self._crashed(*shard[position]) for position in crashing]
        self._refuse(rejected)
        shard = [pair for position, pair in enumerate(shard) if position not in crashing]
        owners: VisionOwners | None = {} if plan.spec.share_vision else None
        for samples in self._batches(shard):
            outputs = self.teacher.outputs(samples, self.config.settings, owners)
            for sample, output in zip(samples, outputs, strict=True):
                if isinstance(output, TeacherOutput):
                    rows.append(CachedSample(sample=sample, output=output))
                else:
                    rejected.append(output)
            self.progress(f"shard {index}", len(rows) + len(rejected), len(plan.shards[index]))
        self._refuse(rejected)
        quality = measure_shard(self.teacher, rows, plan.spec, self.config.quality_samples)
        seconds = time.monotonic() - started
        return write_shard(self.cache, plan, index, rows, rejected, seconds, quality)

    def probe(self, index: int, start: int, stop: int) -> None:
        """Run the teacher over samples start ... stop - 1 of a shard and keep nothing."""
        owners: VisionOwners | None = {} if self._plan.spec.share_vision else None
        done = 0
        for samples in self._batches(self._plan.shards[index][start:stop]):
            self.teacher.outputs(samples, self.config.settings, owners)
            done += len(samples)
            self.progress(f"probe of shard {index}", done, stop - start)

    @cached_property
    def _plan(self) -> Plan:
        plan = require_plan(self.cache)
        self._load_assets(plan)
        return plan

    def _spec(self) -> CacheSpec:
        config = self.config
        return self.teacher.spec(
            config.settings, batch_size=config.batch_size, share_vision=config.share_vision
        )

    def _shards(self, samples: Sequence[ScannedSample]) -> tuple[tuple[tuple[str, int], ...], ...]:
        """(key, index) of the samples by shard; samples of the same images are neighbours."""
        groups = [sample.images if self.config.share_vision else None for sample in samples]
        shards = group_shards(groups, self.config.samples_per_shard)
        return tuple(tuple((samples[i].key, samples[i].index) for i in shard) for shard in shards)

    def _batches(self, shard: Sequence[tuple[str, int]]) -> Iterator[list[Sample]]:
        """Batches of one shard in plan order; the next ones are read while one is in use."""
        size = self.config.batch_size
        batches = [shard[start : start + size] for start in range(0, len(shard), size)]
        with ThreadPoolExecutor(max_workers=1) as pool:
            reads = [pool.submit(self._read, batch) for batch in batches[:2]]
            for number in range(len(batches)):
                yield reads[number].result()
                if number + 2 < len(batches):
                    reads.append(pool.submit(self._read, batches[number + 2]))

    def _read(self, batch: Sequence[tuple[str, int]]) -> list[Sample]:
        return [self._sample(key, index) for key, index in batch]

    def _sample(self, key: str, index: int) -> Sample:
        sample = self.source[index]
        if sample.key != content_key(key):
            raise SampleError(
                sample.source_id,
                f"{self.config.source.path} has changed since the plan was made: sample {index} "
                f"has content {sample.key}, planned {key}; build into a new folder",
            )
        return dataclasses.replace(sample, key=key)

    def _crashed(self, key: str, index: int) -> RejectedSample:
        sample = self._sample(key, index)
        return RejectedSample(key=key, source_id=sample.source_id, reason=CRASHED)

    def _crashed_before(self) -> dict[int, str]:
        """Samples of the source that crashed when an earlier plan was made: position -> id."""
        begun = read_plan(self.cache)
        return {} if begun is None else crashed_before(begun.rejected)

    def _leave_out(self, unreadable: Sequence[int], crashing: Sequence[int] = ()) -> None:
        crashed = {index: source_id_at(self.source, index) for index in unreadable}
        crashed |= {index: self.source[index].source_id for index in crashing}
        if crashed:
            self.source = WithoutCrashing(self.source, crashed)

    def num_to_read(self) -> int:
        """How many samples the source has."""
        return len(self.source)

    def read_only(self, positions: Sequence[int]) -> None:
        """Read these samples of the source and keep nothing."""
        for done, index in enumerate(positions, start=1):
            with suppress(SampleError):
                _ = self.source[index]
            self.progress("search", done, len(positions))

    def calibration_order(self, unreadable: Sequence[int]) -> tuple[list[int], int | None]:
        """Positions of the samples that planning runs over, in order, and the tokens it takes."""
        self._leave_out(unreadable)
        tried = [n for n in positions_to_try(len(self.source)) if n not in unreadable]
        order = self._order(scan(self.source, self.progress)[0])
        return list(dict.fromkeys([*tried, *order])), self.config.settings.calibration_tokens

    def run_over(self, positions: Sequence[int]) -> int:
        """Load the teacher, run it over these samples and keep nothing; returns their tokens."""
        self._tries_samples = False  # one of them may be the one that crashes
        teacher, size, num_tokens = self.teacher, self.config.batch_size, 0
        for start in range(0, len(positions), size):
            samples: list[Sample] = []
            for index in positions[start : start + size]:
                with suppress(SampleError):
                    samples.append(self.source[index])
            num_tokens += teacher.run_over(samples)
            self.progress("search", start + len(samples), len(positions))
        return num_tokens

    def _order(self, scanned: Sequence[ScannedSample]) -> list[int]:
        """Positions of the samples of calibration: spread, those with images if any have."""
        spread = [scanned[position] for position in spread_order(len(scanned))]
        with_images = [sample for sample in spread if sample.images is not None] or spread
        return [sample.index for sample in with_images]

    def _calibrate(self, scanned: Sequence[ScannedSample]) -> None:
        """Fit sketch and template to samples spread over the source."""
        size, wanted = self.config.batch_size, self.config.settings.calibration_tokens
        samples = (self.source[index] for index in self._order(scanned))
        batches = iter(lambda: list(islice(samples, size)), [])
        self._refuse(self.teacher.calibrate(batches, self.config.settings, wanted, self.progress))

    def _load_assets(self, plan: Plan) -> None:
        if self.teacher.sketch is None:
            self.teacher.sketch = read_sketch(self.cache, plan.spec)
        if self.teacher.template is None:
            self.teacher.template = read_template(self.cache, plan.spec)

    def _refuse(self, rejected: Sequence[RejectedSample]) -> None:
        if self.config.on_bad_sample != "record":
            refuse_samples(
                self.config.source.path,
                [f"{each.source_id}: {each.reason}" for each in rejected],
                "Fix them, or build with --on-bad-sample record to list them and leave them out.",
            )


def finished(config: BuildConfig) -> Seal | None:
    """The seal, if this build is complete and none of its inputs has changed since; else None."""
    seal = read_seal(open_store(config.out))
    return seal if seal is not None and is_unchanged(config) else None


def build(config: BuildConfig, progress: Progress = no_progress) -> Seal:
    """Build the whole cache in this process, one shard after the other; resumes what exists."""
    seal = finished(config)
    if seal is not None:
        return seal
    return build_all(CacheBuilder(config, progress), open_store(config.out))
