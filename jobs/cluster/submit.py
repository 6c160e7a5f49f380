"""Sends a stage to a Ray cluster as a job, and follows its log to the end.

The flags are parsed before anything is sent, and the entry point holds the resolved settings.
Paths are made absolute and must be visible to the cluster (shared storage). A submission id is
`<stage>-<digest of the settings>-<attempt>`: submitting a stage again makes the next attempt, and
the stage resumes by itself.
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
    return shlex.join(["python", "-P", "-m", "emkd", stage, "--config", settings, *flags])


def run_flags(options: RayOptions) -> list[str]:
    """The flags that parse to `options`."""
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
    print(f"submitted {submission_id} to {address}", flush=True)
    if not wait:
        return 0
    asyncio.run(_follow(client, submission_id))
    status = client.get_job_status(submission_id)
    print(f"{submission_id}: {status}", flush=True)
    return 0 if status == JobStatus.SUCCEEDED else 1


async def _follow(client: JobSubmissionClient, submission_id: str) -> None:
    async for lines in client.tail_job_logs(submission_id):
        print(lines, end="", flush=True)
