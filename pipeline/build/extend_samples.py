"""Adds samples to a sealed cache, by the same teacher and settings, as a new cache.

Old shards are linked or copied unopened; the old cache does not change. New samples are computed as
by a build, with the settings, sketch basis and template of the cache; samples that it has are left
out. Refuses another teacher, with a table of the fields that differ, and a source without new
samples. Running it again resumes it.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.build.build import CacheBuilder
from pipeline.build.shard_builder import build_all
from pipeline.build.teacher_identity import require_same_teacher
from pipeline.config.build import BuildConfig, SourceConfig
from pipeline.config.extend import ExtendConfig
from pipeline.sources.crashing import crashed_before
from pipeline.sources.source import scan
from pipeline.sources.tried import positions_to_try
from teacher_cache.derive.derive import begin
from teacher_cache.derive.merge import adopt_shard
from teacher_cache.derive.sealed_cache import SealedCache, open_apart
from teacher_cache.folder.layout import read_plan
from teacher_cache.schema.manifest import CacheSpec, Plan, Seal, ShardCommit, require_equal
from teacher_cache.schema.options import PictureRule, TextRules
from teacher_cache.schema.progress import Progress, no_progress


class CacheExtender(CacheBuilder):
    """A builder whose first shards are those of another cache."""

    def __init__(self, config: ExtendConfig, progress: Progress = no_progress) -> None:
        self.base = SealedCache.open(config.cache)
        open_apart(config.out, [self.base])
        super().__init__(_build_config(config, self.base), progress)

    def prepare(self, unreadable: Sequence[int] = (), crashing: Sequence[int] = ()) -> Plan:
        """Write or check the plan: the base's samples, then the source's new ones."""
        self._leave_out(unreadable, crashing)
        spec = self._require_same_spec()
        known = {key for commit in self.base.seal.shards for key, _ in self.base.kept(commit)}
        scanned, rejected = scan(self.source, self.progress)
        self._refuse(rejected)
        new = [sample for sample in scanned if sample.key not in known]
        if not new:
            raise ValueError(
                f"{self.config.source.path}: all of its {len(scanned)} usable samples are in "
                f"{self.base.store} already; there is nothing to add"
            )
        plan = Plan(
            spec=spec,
            format=self.config.format,
            source=f"{self.base.seal.source} + {self.config.source.path}",
            shards=(
                *(self.base.kept(commit) for commit in self.base.seal.shards),
                *self._shards(new),
            ),
            rejected=(*self.base.seal.rejected, *rejected),
        )
        begin(self.cache, plan, self.base.assets)
        return plan

    def calibration_order(self, unreadable: Sequence[int]) -> tuple[list[int], int | None]:
        """The samples on which the processor is tried; the base was calibrated."""
        self._leave_out(unreadable)
        return [n for n in positions_to_try(len(self.source)) if n not in unreadable], None

    def _crashed_before(self) -> dict[int, str]:
        begun = read_plan(self.cache)
        new = () if begun is None else begun.rejected[len(self.base.seal.rejected) :]
        return crashed_before(new)

    def text_rules(self) -> TextRules:
        """The rules of the base."""
        return self.base.spec.text

    def picture_rule(self) -> PictureRule:
        """The rule of the base."""
        return self.base.spec.pictures

    def build_shard(self, index: int, crashing: Sequence[int] = ()) -> ShardCommit:
        """Adopt shard `index` of the base, or run the teacher over a new one."""
        if index < len(self.base.seal.shards):
            commit = self.base.seal.shards[index]
            return adopt_shard(self.cache, self._plan, index, self.base, commit)
        return super().build_shard(index, crashing)

    def _require_same_spec(self) -> CacheSpec:
        """The base's spec; refused unless this teacher and these settings give the same."""
        require_same_teacher(self.base.spec, self.teacher, self.config.teacher)
        assets = self.base.assets
        self.teacher.sketch, self.teacher.template = assets.sketch, assets.template
        found = self._spec()
        remedy = "Extend a cache with its own teacher and settings only."
        require_equal(self.base.spec, found, f"{self.base.store}: its spec", remedy)
        return found


def extend_samples(config: ExtendConfig, progress: Progress = no_progress) -> Seal:
    """Write a cache's samples and a source's new ones as one new cache, in this process."""
    extender = CacheExtender(config, progress)
    return build_all(extender, extender.cache)


def _build_config(config: ExtendConfig, base: SealedCache) -> BuildConfig:
    """The settings of the build that computes what the base holds."""
    spec: Any = base.spec
    if config.source is None:
        raise ValueError("new samples need a source")
    size = config.samples_per_shard or max(commit.num_rows for commit in base.seal.shards)
    return BuildConfig(
        settings=spec.settings,
        system_prompt=spec.system_prompt,
        share_vision=spec.share_vision,
        batch_size=spec.batch_size,
        attention=spec.attention,
        dtype=spec.compute_dtype,
        source=SourceConfig(
            path=config.source,
            image_root=config.image_root,
            limit=config.limit,
            max_pixels=config.max_pixels,
            confine_images=config.confine_images,
        ),
        teacher=config.teacher,
        out=config.out,
        format=base.seal.format,
        samples_per_shard=size,
        device=config.device,
        on_bad_sample=config.on_bad_sample,
        torch_threads=config.torch_threads,
        plugin=config.plugin,
    )
