"""Where a stage runs. Imports no Ray, so that `emkd --help` stays quick."""

from dataclasses import dataclass

from teacher_cache.schema.strict_json import StrictRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions(StrictRecord):
    """Where a stage runs, never what it computes."""

    ray: bool = True
    """Run under Ray: the cluster of RAY_ADDRESS (set in a submitted job), else an embedded one.
    Without Ray, a sample that crashes or hangs the process ends the stage and is not named."""
    num_workers: int = 1
    """Worker processes."""
    cpus_per_worker: float = 1.0
    """CPUs that a worker reserves."""
    gpus_per_worker: float | None = None
    """Default: 1 where the cluster has GPUs and the stage may use them, else 0. Ray hides GPUs from
    workers that ask for none."""
    max_retries: int = 2
    """Retries of work whose worker died. A shard of a build is retried once, then searched for the
    samples that crash workers; 0 disables both."""
    worker_timeout: float | None = None
    """Build and extend only: seconds without progress (a batch, loading a teacher) after which a
    worker is killed and its work retried. Default: no limit."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"num_workers must be >= 1, found {self.num_workers}")
        for name in ("cpus_per_worker", "gpus_per_worker", "max_retries"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be >= 0, found {getattr(self, name)}")
        if self.worker_timeout is not None and not (self.ray and self.worker_timeout > 0):
            raise ValueError(
                f"worker_timeout must be > 0 and needs Ray workers; found "
                f"{self.worker_timeout} {'with' if self.ray else 'without'} ray"
            )

    def require_no_timeout(self, stage: str) -> None:
        """Raise ValueError if `worker_timeout` is set for a stage that has none."""
        if self.worker_timeout is not None:
            raise ValueError(
                f"--worker-timeout goes with emkd build and extend; {stage} has no timeout: omit it"
            )
