"""Samples that crash the worker that plans are named or rejected, and not met again."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster.options import RayOptions
from pipeline.build.build import CacheBuilder
from pipeline.config.build import BuildConfig, SourceConfig
from pipeline.sources.source import SampleSource
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.options import RecordSettings
from teacher_cache.schema.samples import Sample
from teacher_cache.teacher.teacher import Teacher
from tests.support.lazy import ray_session, run_build
from tests.support.llava_json import write_llava_json
from tests.support.tiny import tiny_samples

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

SAMPLES = tiny_samples(4)
CRASHES_READERS, CRASHES_TEACHERS = 3, 1


class Deadly:
    """A source of which one sample ends the process that reads it."""

    def __init__(self, source: SampleSource, tries: Path) -> None:
        self._source, self._tries = source, tries

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        if index == CRASHES_READERS:
            self._tries.touch()
            os._exit(1)
        return self._source[index]


class Fragile(CacheBuilder):
    """A builder with such a source, whose teacher dies of one more sample."""

    @cached_property
    def teacher(self) -> Teacher:
        teacher: Any = CacheBuilder.teacher.func(self)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
        states = teacher._states

        def deadly(encoded: Sequence[Any], *rest: Any) -> Any:
            if any(item.source_id == SAMPLES[CRASHES_TEACHERS].source_id for item in encoded):
                os._exit(1)
            return states(encoded, *rest)

        teacher._states = deadly
        return teacher


def _open(config: SourceConfig) -> Any:
    from pipeline.sources.source import open_source

    return Deadly(open_source(config), Path(config.path).parent / "tries")


def _fragile(config: BuildConfig, progress: Any) -> CacheBuilder:
    import pipeline.build.build as module

    module.open_source = _open
    return Fragile(config, progress)


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session():
        yield


def test_samples_that_crash_planning_are_named_rejected_and_not_met_again(
    tmp_path: Path, llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.stages.build.CacheBuilder", _fragile)
    source = write_llava_json(tmp_path, SAMPLES)
    config = BuildConfig(
        source=SourceConfig(path=str(source)),
        teacher=str(llava),
        out=str(tmp_path / "cache"),
        samples_per_shard=3,
        batch_size=2,
        settings=RecordSettings(records="topk+sketch", top_k=8),
        on_bad_sample="record",
    )
    options = RayOptions()
    seal = run_build(config, options)
    named = [SAMPLES[CRASHES_TEACHERS].source_id, f"{source.name}:{CRASHES_READERS}"]
    assert [each.source_id for each in seal.rejected] == named
    assert {each.reason for each in seal.rejected} == {"killed its worker"}
    reader = CacheReader.open(config.out)
    found = {reader.read(index, ()).sample.source_id for index in range(len(reader))}
    assert found == {SAMPLES[index].source_id for index in (0, 2)}

    tries = tmp_path / "tries"
    tries.unlink()
    source.touch()  # the source is read again, except for the samples that the plan names
    again = run_build(config, options)
    assert again == seal
    assert not tries.exists()
    refusing = dataclasses.replace(config, on_bad_sample="refuse")
    with pytest.raises(ValueError, match=rf"(?s)2 samples cannot be used.*{named[1]}: killed its"):
        run_build(refusing, options)
