"""`emkd submit`: the same stages as jobs of a Ray cluster, followed to their end.

The flags are parsed here first, so that a typo fails before anything is sent; the resolved
settings travel inside the entry point. Paths must be visible to the cluster (shared storage) and
are made absolute. A submission id is `<stage>-<digest of the settings>-<attempt>`: submitting a
stage again gives the next attempt, and the stage resumes by itself.
"""

import asyncio
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.cluster.options import RayOptions
from teacher_cache.schema.fingerprint import digest_json


def entrypoint(stage: str, settings: str, flags: Sequence[str]) -> str:
    """The shell command of the job; `settings` is the JSON of the stage's resolved config."""
    return shlex.join(["python", "-m", "jobs.cli.__main__", stage, "--config", settings, *flags])


def run_flags(options: RayOptions) -> list[str]:
    """The flags that give `options` back when they are parsed again."""
    flags = ["--ray" if options.ray else "--no-ray"]
    for field in dataclasses.fields(options):
        if field.name != "ray":
            name = field.name.replace("_", "-")
            flags += [f"--{name}", str(getattr(options, field.name))]
    return flags


def submit(
    *,
    address: str,
    stage: str,
    command: str,
    identity: object,
    working_dir: Path | None,
    driver_cpus: float,
    stop_wait_s: int,
    wait: bool,
    echo: "Echo",
) -> int:
    """Send the job, print its log until it ends, return 0 on success and 1 on failure."""
    client = JobSubmissionClient(address)
    prefix = f"{stage}-{digest_json(identity)[:8]}"
    try:
        taken = {job.submission_id for job in client.list_jobs()}
    except AuthenticationError as error:
        raise ValueError(f"{address} wants a token: {error}") from error
    attempt = next(n for n in range(len(taken) + 1) if f"{prefix}-{n}" not in taken)
    runtime_env: dict[str, object] = {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s), "RAY_DEDUP_LOGS": "0"}
    }
    if working_dir is not None:
        runtime_env["working_dir"] = str(working_dir)
    submission_id = client.submit_job(
        entrypoint=command,
        submission_id=f"{prefix}-{attempt}",
        runtime_env=runtime_env,
        entrypoint_num_cpus=driver_cpus,
    )
    echo(f"submitted {submission_id} to {address}\n")
    if not wait:
        return 0
    asyncio.run(_follow(client, submission_id, echo))
    status = client.get_job_status(submission_id)
    echo(f"{submission_id}: {status}\n")
    return 0 if status == JobStatus.SUCCEEDED else 1


class Echo:
    """Where log text goes; a class so that tests can collect it."""

    def __call__(self, text: str) -> None:
        """Print a piece of log as it comes."""
        print(text, end="", flush=True)


async def _follow(client: JobSubmissionClient, submission_id: str, echo: Echo) -> None:
    async for lines in client.tail_job_logs(submission_id):
        echo(lines)
