"""The loss of a machine of the cluster: the others finish the build, with the same bytes."""

import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from jobs.cluster.options import RayOptions
from pipeline.build.build import CacheBuilder, build
from pipeline.config.build import BuildConfig, SourceConfig
from teacher_cache.schema.manifest import ShardCommit
from teacher_cache.schema.options import RecordSettings
from tests.support.lazy import Cluster, ray, run_build
from tests.support.llava_json import shard_bytes, write_llava_json
from tests.support.tiny import tiny_samples

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


class Doomed(CacheBuilder):
    """A worker that takes for ever on the machine whose id is in a file beside the cache.

    Those on other machines wait until it has begun.
    """

    def build_shard(self, index: int, crashing: Sequence[int] = ()) -> ShardCommit:
        folder = Path(self.config.out).parent
        if ray.get_runtime_context().get_node_id() == (folder / "doomed").read_text():
            (folder / "at work").touch()
            time.sleep(3600)
        while not (folder / "at work").exists():
            time.sleep(0.1)
        return super().build_shard(index, crashing)


def test_a_machine_that_is_lost_costs_only_its_own_work(
    cluster: Cluster, tmp_path: Path, llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.stages.build.CacheBuilder", Doomed)
    before = {node["NodeID"] for node in ray.nodes()}
    machine = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    (doomed,) = {node["NodeID"] for node in ray.nodes()} - before
    (tmp_path / "doomed").write_text(doomed)

    def lose() -> None:
        while not (tmp_path / "at work").exists():
            time.sleep(0.1)
        cluster.remove_node(machine, allow_graceful=False)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    source = SourceConfig(path=str(write_llava_json(tmp_path, tiny_samples(6))))
    teacher, out = str(llava), str(tmp_path / "cache")
    config = BuildConfig(
        source=source,
        teacher=teacher,
        out=out,
        samples_per_shard=2,
        batch_size=2,
        settings=RecordSettings(top_k=8),
    )
    seal = run_build(config, RayOptions(num_workers=2))
    thread.join()
    assert seal.num_samples == 6
    build(dataclasses.replace(config, out=str(tmp_path / "local")))
    assert shard_bytes(out) == shard_bytes(tmp_path / "local")
