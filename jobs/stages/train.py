"""`emkd train`: the train stage in this process, or in workers that Ray Train starts.

Resuming needs nothing of Ray's run folder, so each attempt gets a new one. After the loss of a
worker, Ray starts all workers again, and the stage resumes from its newest complete checkpoint.
"""

import json
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from jobs.cluster.actor_pool import ray_session, worker_resources
from jobs.cluster.options import RayOptions
from jobs.cluster.paths import absolute, config_json
from jobs.cluster.progress import ProgressBars
from pipeline.config.plugins import load_plugins
from pipeline.config.stages import TrainConfig
from pipeline.student.train import train
from student_train.training.checkpoint import FINAL_FOLDER, RUN_FILE
from student_train.training.metrics_log import last_line
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.strict_json import decode_json


def run_train(config: TrainConfig, options: RayOptions) -> Path:
    """Train, or go on training, the student of `config`; returns the folder of the result."""
    options.require_no_timeout("train")
    config = absolute(config)
    load_plugins(config.plugin)
    if not options.ray:
        with ProgressBars() as bars:
            return train(config, report=bars.metrics, progress=bars.update)
    num_steps = config.training.num_steps(len(CacheReader.open(config.cache)))
    with ray_session(), _progress(config.out, num_steps):
        each = worker_resources(options, config.training.device)
        trainer = TorchTrainer(
            train_in_worker,
            train_loop_config={"config": config_json(config)},
            scaling_config=ScalingConfig(
                num_workers=options.num_workers,
                use_gpu=each["GPU"] > 0,
                resources_per_worker={name: count for name, count in each.items() if count},
            ),
            run_config=RunConfig(
                name=f"attempt-{time.time_ns()}",
                storage_path=str(config.out / "ray"),
                failure_config=FailureConfig(max_failures=options.max_retries),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _cause(error) from None
    return config.out / FINAL_FOLDER


@contextmanager
def _progress(run: Path, num_steps: int) -> Generator[None]:
    """Show progress, while the block runs, from the run's own metrics, which some worker writes."""
    ended = threading.Event()

    def follow() -> None:
        with ProgressBars() as bars:
            over = False
            while not over:
                over = ended.wait(timeout=1.0)
                line = last_line(run)
                bars.metrics(line)
                bars.update("steps", line.get("step", 0), _num_steps(run, num_steps))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _num_steps(run: Path, expected: int) -> int:
    """The steps of a run that has begun, which has fewer where samples are skipped."""
    path = run / RUN_FILE
    return int(json.loads(path.read_text())["num_steps"]) if path.exists() else expected


def train_in_worker(loop_config: dict[str, str]) -> None:
    """Run the stage in a worker of Ray Train, with the process group that Ray has set up."""
    config = decode_json(TrainConfig, loop_config["config"], "train_loop_config")
    train(config, report=lambda line: ray.train.report(dict(line)))


def _cause(error: TrainingFailedError) -> BaseException:
    """The exception of the first worker that failed, as that worker raised it."""
    failures: Mapping[int, Any] = getattr(error, "worker_failures", {})
    first = next((failure for _, failure in sorted(failures.items())), None)
    return first if isinstance(first, BaseException) else error
