"""From a source to a trained student with the cache on a real S3 server, as with it on a disk."""

import dataclasses
import time
import uuid
from pathlib import Path

import pytest
import torch

from jobs.cli.__main__ import main
from jobs.cluster.paths import absolute
from pipeline.build.build import build
from pipeline.config.build import BuildConfig
from pipeline.config.stages import TrainConfig
from student_train.config.recipe import TrainerSettings
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.options import RecordSettings
from teacher_cache.storage.open_store import open_store
from tests.support.changed import changed
from tests.support.children import finish, start
from tests.support.lazy import train
from tests.support.llava_json import small_build
from tests.support.runs import weights
from tests.support.s3_server import BUCKET, S3Server
from tests.support.tiny import tiny_samples

pytestmark = pytest.mark.usefixtures("threads_as_before")
NUM_SAMPLES = 6


@pytest.fixture
def config(tmp_path: Path, llava: Path, s3: S3Server) -> BuildConfig:
    samples, settings = tiny_samples(NUM_SAMPLES), RecordSettings(top_k=8)
    out = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    return small_build(tmp_path, samples, llava, settings, out=out)


def shards(location: str) -> dict[str, bytes]:
    """Every shard file of a cache."""
    store = open_store(location)
    return {name: store.read(name) for name in store.names("shards")}


def test_two_builders_on_s3_make_one_cache_and_a_student_learns_the_same_from_it(
    config: BuildConfig, s3: S3Server, tmp_path: Path
) -> None:
    local = build(dataclasses.replace(config, out=str(tmp_path / "local")))
    racing = [start(build, config, environment=s3.environment) for _ in range(2)]
    assert finish(*racing) == [0, 0]
    seal = build(config)  # finished: says so
    assert seal.fingerprint == local.fingerprint
    assert shards(config.out) == shards(str(tmp_path / "local"))
    assert main(["verify", config.out]) == 0
    assert main(["gc", config.out, "--grace-hours", "0"]) == 0
    runs = [
        TrainConfig(
            cache=cache,
            student=config.teacher,
            out=tmp_path / f"run-{number}",
            torch_threads=1,
            training=TrainerSettings(
                max_steps=2,
                batch_size=4,
                micro_batch_size=2,
                device="cpu",
            ),
        )
        for number, cache in enumerate((config.out, str(tmp_path / "local")))
    ]
    remote, near = (weights(train(run)) for run in runs)
    assert all(torch.equal(remote[name], near[name]) for name in near)


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_changes_nothing(
    config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    config = changed(config, records="topk")
    true_time, num_calls = time.time, 0
    built = build(dataclasses.replace(config, out=str(tmp_path / "steady")))

    def jumping() -> float:
        nonlocal num_calls
        num_calls += 1
        return true_time() + jump_s * (num_calls % 2)

    out = str(tmp_path / "jumping")
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping)
        seal = build(dataclasses.replace(config, out=out))
        assert len(CacheReader.open(out)) == NUM_SAMPLES
    assert seal.fingerprint == built.fingerprint
    assert shards(out) == shards(str(tmp_path / "steady"))


def test_a_missing_bucket_is_named(s3: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "s3://no-such-bucket/cache"]) == 2
    assert "is not a cache: there is no bucket 'no-such-bucket'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot be written: there is no bucket 'no-such-bucket'"):
        open_store("s3://no-such-bucket/cache").require_writable()
    assert main(["verify", f"s3://{BUCKET}/nothing"]) == 2
    assert "is not a cache: it has no plan.json" in capsys.readouterr().err


def test_urls_stay_as_they_are_and_folders_become_absolute(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute(config).out == config.out
    assert absolute(dataclasses.replace(config, out="caches/a")).out == str(tmp_path / "caches/a")
    run = TrainConfig(cache="s3://b/c", student="hub/model", out=Path("run"))
    assert (absolute(run).cache, absolute(run).out) == ("s3://b/c", tmp_path / "run")
