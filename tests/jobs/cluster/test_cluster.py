"""The stages on a real cluster: submitted as jobs, followed to the end, resumed by submitting."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.build.build import build
from pipeline.config.build import BuildConfig, SourceConfig
from teacher_cache.schema.options import RecordSettings
from tests.support.llava_json import shard_bytes, write_llava_json
from tests.support.paths import ROOT
from tests.support.tiny import tiny_samples

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class RunningCluster:
    """A Ray head with its job server on loopback, and the environment that may talk to it."""

    address: str
    env: Mapping[str, str]

    def ray(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self._run(str(BIN / "ray"), *arguments)

    def submit(self, stage: str, *flags: str) -> "subprocess.CompletedProcess[str]":
        command = [
            sys.executable,
            "-m",
            "jobs.cli.__main__",
            "submit",
            stage,
            "--address",
            self.address,
        ]
        return self._run(*command, "--", *flags)

    def _run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command, cwd=ROOT, env=self.env, capture_output=True, text=True, check=False
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    port, dashboard = _free_port(), _free_port()
    log = tmp_path_factory.mktemp("cluster") / "log"
    env = {
        **os.environ,
        # the entry points say `python`: let it be the one that runs these tests
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={port}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env)
    running = RunningCluster(address=f"http://127.0.0.1:{dashboard}", env=env)
    try:
        deadline = time.monotonic() + 90
        while running.ray("job", "list", "--address", running.address).returncode != 0:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the cluster did not come up: {log.read_text()[-2000:]}")
        yield running
    finally:
        process.terminate()  # with --block, the head takes its processes along
        process.wait(timeout=60)


def test_the_stages_as_jobs(cluster: RunningCluster, tmp_path: Path, llava: Path) -> None:
    source = write_llava_json(tmp_path, tiny_samples(6))
    teacher, cache = str(llava), tmp_path / "cache"
    flags = ["--source", str(source), "--teacher", teacher, "--out", str(cache), "--top-k", "8"]
    flags += ["--samples-per-shard", "2", "--batch-size", "2"]
    job = cluster.submit("build", *flags)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "6 samples in 3 shards" in job.stdout  # the job's own log, followed to the end
    build(
        BuildConfig(
            source=SourceConfig(path=str(source)),
            teacher=teacher,
            out=str(tmp_path / "local"),
            samples_per_shard=2,
            batch_size=2,
            settings=RecordSettings(top_k=8),
        )
    )
    assert shard_bytes(cache) == shard_bytes(tmp_path / "local")

    again = cluster.submit("build", *flags)  # resumes: all is there
    assert again.returncode == 0, again.stdout + again.stderr
    assert "-1 to http" in again.stdout  # the next attempt of the same stage

    train = ["--student", teacher, "--max-steps", "2", "--batch-size", "2"]
    train += ["--micro-batch-size", "2", "--out", str(tmp_path / "run")]
    job = cluster.submit("train", *train, "--cache", str(cache))
    assert job.returncode == 0, job.stdout + job.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()

    evaluate = ["--model", str(tmp_path / "run" / "final"), "--source", str(source)]
    evaluate += ["--out", str(tmp_path / "eval"), "--max-new-tokens", "2"]
    job = cluster.submit("evaluate", *evaluate, "--ray")
    assert job.returncode == 0, job.stdout + job.stderr
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["num_samples"] == 6

    # a job that fails says why in the log that was followed, and in the exit code
    job = cluster.submit("train", *train, "--cache", str(tmp_path / "nothing"))
    assert job.returncode == 1
    assert "is not a cache" in job.stdout
