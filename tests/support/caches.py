"""Small sealed caches of tiny teachers, and students that fit them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.writer import seal_cache, write_assets, write_plan, write_shard
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.manifest import Plan
from teacher_cache.schema.options import RecordSettings, ShardFormatName, holds
from teacher_cache.schema.samples import Sample
from teacher_cache.schema.teacher_output import CachedSample, TeacherOutput
from teacher_cache.storage.open_store import open_store
from teacher_cache.storage.store import Location
from teacher_cache.teacher.teacher import Teacher
from tests.support.lazy import PreTrainedModel, ProcessorMixin, student_from_vanilla


def build_cache(
    location: Location,
    teacher: Teacher,
    samples: Sequence[Sample],
    settings: RecordSettings,
    *,
    form: ShardFormatName = "arrow",
    samples_per_shard: int = 4,
) -> CacheReader:
    """A sealed cache of the samples, all of which the teacher must accept."""
    cache = open_store(location)
    if holds(settings.records, "topk"):
        teacher.calibrate([samples], settings)
    keys = [(sample.key, position) for position, sample in enumerate(samples)]
    plan = write_plan(
        cache,
        Plan(
            spec=teacher.spec(settings, batch_size=samples_per_shard),
            format=form,
            source="tests",
            shards=tuple(
                tuple(keys[start : start + samples_per_shard])
                for start in range(0, len(keys), samples_per_shard)
            ),
        ),
    )
    head = teacher.head if holds(settings.records, "hidden") else None
    sketch = teacher.sketch if holds(settings.records, "sketch") else None
    template = teacher.template if holds(settings.records, "topk") else None
    write_assets(cache, TeacherAssets(head=head, sketch=sketch, template=template))
    for index, shard in enumerate(plan.shards):
        members = [samples[position] for _, position in shard]
        outputs = teacher.outputs(members, settings)
        rows = [
            CachedSample(sample=sample, output=output)
            for sample, output in zip(members, outputs, strict=True)
            if isinstance(output, TeacherOutput)
        ]
        write_shard(cache, plan, index, rows, [], 0.0)
    seal_cache(cache)
    return CacheReader.open(cache)


def student_loader(folder: Path) -> Callable[[], tuple[PreTrainedModel, ProcessorMixin]]:
    """Loads a vanilla folder as a float32 student that pools 2 x 2."""
    return lambda: student_from_vanilla(str(folder), stride=2, dtype=torch.float32)
