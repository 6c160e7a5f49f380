"""`emkd evaluate`: the evaluation stage in this process, or as one task of a Ray cluster."""

from typing import Any

import ray

from jobs.cluster.actor_pool import get, ray_session, worker_resources
from jobs.cluster.options import RayOptions
from jobs.cluster.paths import absolute
from jobs.cluster.progress import ProgressBars
from pipeline.config.plugins import load_plugins
from pipeline.config.stages import EvaluateConfig
from pipeline.student.evaluate import evaluate


def run_evaluate(config: EvaluateConfig, options: RayOptions) -> dict[str, Any]:
    """Evaluate and return the metrics, as they are written to metrics.json."""
    options.require_no_timeout("evaluate")
    config = absolute(config)
    load_plugins(config.plugin)
    if not options.ray:
        with ProgressBars() as bars:
            return evaluate(config, bars.update)
    with ray_session():
        each = worker_resources(options, config.device)
        task = ray.remote(evaluate).options(
            num_cpus=each["CPU"], num_gpus=each["GPU"], max_retries=options.max_retries
        )
        return get(task.remote(config))
