"""A sample that kills its worker costs a bounded number of workers, and no other sample."""

import dataclasses
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster.options import RayOptions
from pipeline.build.build import CacheBuilder
from pipeline.config.build import BuildConfig, SourceConfig
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.options import RecordSettings
from teacher_cache.teacher.teacher import Teacher
from tests.support.lazy import actor_pool, ray_session, run_build
from tests.support.llava_json import write_llava_json
from tests.support.tiny import tiny_samples

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

NUM_SAMPLES = 6
KILLER = tiny_samples(NUM_SAMPLES)[4].source_id


class Fragile(CacheBuilder):
    """A builder whose process ends without a word when the teacher is given the killer."""

    @cached_property
    def teacher(self) -> Teacher:
        teacher: Any = CacheBuilder.teacher.func(self)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
        outputs = teacher.outputs

        def deadly(samples: Any, *rest: Any) -> Any:
            if any(sample.source_id == KILLER for sample in samples):
                os._exit(1)
            return outputs(samples, *rest)

        teacher.outputs = deadly
        return teacher


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture
def config(tmp_path: Path, llava: Path, monkeypatch: pytest.MonkeyPatch) -> BuildConfig:
    monkeypatch.setattr("jobs.stages.build.CacheBuilder", Fragile)
    return BuildConfig(
        source=SourceConfig(path=str(write_llava_json(tmp_path, tiny_samples(NUM_SAMPLES)))),
        teacher=str(llava),
        out=str(tmp_path / "cache"),
        samples_per_shard=3,
        batch_size=2,
        settings=RecordSettings(records="topk", top_k=8),
    )


def test_a_sample_that_kills_its_worker_is_rejected_and_the_build_goes_on(
    config: BuildConfig,
) -> None:
    with pytest.raises(ValueError, match=f"{KILLER}: killed its worker"):
        run_build(config, RayOptions())
    seal = run_build(dataclasses.replace(config, on_bad_sample="record"), RayOptions())
    assert [(r.source_id, r.reason) for r in seal.rejected] == [(KILLER, "killed its worker")]
    reader = CacheReader.open(config.out)
    found = {reader.read(index, ()).sample.source_id for index in range(len(reader))}
    assert found == {sample.source_id for sample in tiny_samples(NUM_SAMPLES)} - {KILLER}


def test_without_retries_the_first_death_ends_the_build(config: BuildConfig) -> None:
    with pytest.raises(actor_pool.WorkerLostError, match="its worker was lost 1 times"):
        run_build(config, RayOptions(max_retries=0))
