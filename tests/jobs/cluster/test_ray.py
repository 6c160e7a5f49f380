"""Promises of the stages under Ray: same bytes as in a plain loop, errors as themselves."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.cluster.options import RayOptions
from pipeline.build.build import build
from pipeline.config.build import BuildConfig, SourceConfig
from pipeline.config.extend import ExtendConfig
from pipeline.config.stages import EvaluateConfig, TrainConfig
from student_train.config.recipe import TrainerSettings
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.options import RecordSettings
from tests.support.lazy import ray_session, run_build, run_evaluate, run_extend, run_train, train
from tests.support.llava_json import shard_bytes, write_llava_json
from tests.support.tiny import tiny_samples

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    # Ray Train copies Ray Data's settings, which warn of themselves
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
    pytest.mark.filterwarnings("ignore::UserWarning:ray.data.context"),
]


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, llava: Path) -> BuildConfig:
    folder = tmp_path_factory.mktemp("ray")
    config = BuildConfig(
        source=SourceConfig(path=str(write_llava_json(folder, tiny_samples(10)))),
        teacher=str(llava),
        out=str(folder / "local"),
        samples_per_shard=3,
        batch_size=2,
        settings=RecordSettings(top_k=8),
    )
    build(config)
    return config


def test_a_pool_of_teachers_writes_the_same_bytes(built: BuildConfig) -> None:
    under_ray = dataclasses.replace(built, out=str(Path(built.out).parent / "ray"))
    seal = run_build(under_ray, RayOptions(num_workers=2))
    assert seal.num_samples == 10
    assert shard_bytes(under_ray.out) == shard_bytes(built.out)
    said = [commit.quality for commit in CacheReader.open(built.out).seal.shards]
    assert [commit.quality for commit in seal.shards] == said
    assert None not in said


@pytest.mark.parametrize("what", ["samples", "records"])
def test_a_pool_extends_a_cache_by_the_same_bytes(
    built: BuildConfig, tmp_path: Path, what: str
) -> None:
    source = str(write_llava_json(tmp_path, tiny_samples(16)))
    more = ExtendConfig(
        cache=built.out,
        out=str(tmp_path / "ray"),
        teacher=built.teacher,
        source=source if what == "samples" else None,
        device="cpu",
        settings=None if what == "samples" else RecordSettings(records="hidden"),
    )
    seal = run_extend(more, RayOptions(num_workers=2))
    alone = dataclasses.replace(more, out=str(tmp_path / "alone"))
    assert run_extend(alone, RayOptions(ray=False)).fingerprint == seal.fingerprint
    assert seal.num_samples == (16 if what == "samples" else 10)
    assert shard_bytes(more.out) == shard_bytes(alone.out)
    assert [c.quality for c in seal.shards] == [
        c.quality for c in CacheReader.open(alone.out).seal.shards
    ]


def test_a_bad_sample_reaches_the_caller_as_its_own_error(
    built: BuildConfig, tmp_path: Path
) -> None:
    samples = tiny_samples(4)
    source = write_llava_json(tmp_path, samples)
    (tmp_path / f"{samples[1].source_id}-0.png").unlink()
    config = dataclasses.replace(
        built, source=SourceConfig(path=str(source)), out=str(tmp_path / "cache")
    )
    with pytest.raises(ValueError, match=samples[1].source_id) as caught:
        run_build(config, RayOptions())
    assert "Traceback" not in str(caught.value)


def _three_steps(built: BuildConfig, folder: str) -> TrainConfig:
    return TrainConfig(
        cache=built.out,
        student=built.teacher,
        out=Path(built.out).parent / folder,
        torch_threads=1,
        training=TrainerSettings(
            max_steps=3,
            batch_size=4,
            micro_batch_size=2,
            learning_rate=1e-3,
            log_steps=1,
        ),
    )


def test_training_under_ray_gives_the_same_weights(built: BuildConfig) -> None:
    config = _three_steps(built, "run-local")
    local = load_file(train(config) / "model.safetensors")
    under_ray = dataclasses.replace(config, out=Path(built.out).parent / "run-ray")
    remote = load_file(run_train(under_ray, RayOptions()) / "model.safetensors")
    assert local.keys() == remote.keys()
    assert all(bool((local[name] == remote[name]).all()) for name in local)


def test_two_workers_take_the_same_steps_as_one(built: BuildConfig) -> None:
    config = _three_steps(built, "run-one")
    one = load_file(train(config) / "model.safetensors")
    pair = dataclasses.replace(config, out=Path(built.out).parent / "run-two")
    two = load_file(run_train(pair, RayOptions(num_workers=2)) / "model.safetensors")
    for name, values in one.items():
        assert float((values - two[name]).abs().max()) < 1e-4, name


def test_evaluation_as_a_task_gives_the_same_scores(built: BuildConfig, tmp_path: Path) -> None:
    config = EvaluateConfig(
        model=built.teacher, source=built.source, out=tmp_path / "a", max_new_tokens=3
    )
    local = run_evaluate(config, RayOptions(ray=False))
    remote = run_evaluate(dataclasses.replace(config, out=tmp_path / "b"), RayOptions())
    assert local["scores"] == remote["scores"]


def test_more_workers_than_the_cluster_has_are_refused(built: BuildConfig) -> None:
    config = dataclasses.replace(built, out=str(Path(built.out).parent / "too-many"))
    with pytest.raises(ValueError, match="1000 workers need 1000 CPUs"):
        run_build(config, RayOptions(num_workers=1000))


def test_two_workers_that_share_a_student_give_the_same_weights(built: BuildConfig) -> None:
    config = _three_steps(built, "run-whole").with_training(micro_batch_size=1)
    local = load_file(train(config) / "model.safetensors")
    shared = dataclasses.replace(
        config.with_training(shard="fsdp", device="cpu"),
        out=Path(built.out).parent / "run-sharded",
    )
    remote = load_file(run_train(shared, RayOptions(num_workers=2)) / "model.safetensors")
    assert local.keys() == remote.keys()
    for name in local:
        torch.testing.assert_close(local[name], remote[name], atol=1e-5, rtol=1e-4)
