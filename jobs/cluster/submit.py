"""Sends a stage to a Ray cluster as a job, and follows its log to the end.

The flags are parsed before anything is sent, and the entry point holds the resolved settings.
Paths are made absolute and must be visible to the cluster (shared storage). A submission id is
`<stage>-<digest of the settings>-<attempt>`: submitting a stage again makes the next attempt, and
the stage resumes by itself. An address that is given is where it is sent, even where Ray's
variables name another.
"""

import asyncio
import dataclasses
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.cluster.options import RayOptions
from teacher_cache.schema.errors import describe
from teacher_cache.schema.fingerprint import digest_json

LOST = 5
"""Exit code where the job server no longer answers: the job may have succeeded or not."""
LOST_AFTER_S = 60.0
"""How long a job server may stay away while its job runs."""
AGENT_WAIT_S = 60.0
"""How long a starting cluster may have no agent that takes jobs."""
_NO_AGENT = ("No available agent", "Failed to get head node agent")
POLL_S = 2.0
_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that Ray prefers to an address that it is given."""


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
    address: str | None,
    stage: str,
    command: str,
    identity: object,
    working_dir: Path | None,
    driver_cpus: float,
    stop_wait_s: int,
    wait: bool,
) -> int:
    """Send the job, print its log until it ends; returns an exit code.

    0 on success, 1 if the job failed, `LOST` where its end could not be learnt. Without an address
    Ray's own rules apply: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, then this machine.
    """
    client = _connect(address)
    where = client.get_address()
    prefix = f"{stage}-{digest_json(identity)[:8]}"
    try:
        taken = {job.submission_id for job in client.list_jobs()}
    except AuthenticationError as error:
        raise ValueError(f"{where} wants a token: {error}") from error
    attempt = next(n for n in range(len(taken) + 1) if f"{prefix}-{n}" not in taken)
    runtime_env: dict[str, object] = {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s), "RAY_DEDUP_LOGS": "0"}
    }
    if working_dir is not None:
        runtime_env["working_dir"] = str(working_dir)
    submission_id = _when_an_agent_is_there(
        where,
        lambda: client.submit_job(
            entrypoint=command,
            submission_id=f"{prefix}-{attempt}",
            runtime_env=runtime_env,
            entrypoint_num_cpus=driver_cpus,
        ),
    )
    print(f"submitted {submission_id} to {where}", flush=True)
    if not wait:
        return 0
    try:
        asyncio.run(_follow(client, submission_id))
    except (OSError, RuntimeError, aiohttp.ClientError) as error:
        print(f"{submission_id}: its log broke off ({describe(error)})", flush=True)
    status = _end(client, submission_id)
    if status is None:
        print(
            f"{submission_id}: {where} does not answer, the job may go on. Follow it: "
            f"ray job logs --follow {submission_id} --address {where}; how it ended: "
            f"ray job status {submission_id} --address {where}. Submitting the stage again resumes "
            "it, once this job has ended",
            flush=True,
        )
        return LOST
    print(f"{submission_id}: {status}", flush=True)
    return 0 if status == JobStatus.SUCCEEDED else 1


def _connect(address: str | None) -> JobSubmissionClient:
    """A client of the job server at this address, whatever the environment says."""
    hidden = {} if address is None else {name: os.environ.pop(name, None) for name in _VARIABLES}
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ValueError(f"{address or 'the cluster'} wants a token: {error}") from error
    except (RuntimeError, KeyError, ImportError) as error:
        raise ValueError(
            f"{address or 'what the environment names'} is no Ray job server ({describe(error)}); "
            "give the address of the cluster's dashboard, for example http://head:8265"
        ) from error
    finally:
        os.environ.update({name: value for name, value in hidden.items() if value is not None})


def _when_an_agent_is_there(where: str, send: Callable[[], str]) -> str:
    """Send a job; while a starting cluster has no agent yet, try again for `AGENT_WAIT_S`."""
    deadline = time.monotonic() + AGENT_WAIT_S
    while True:
        try:
            return send()
        except RuntimeError as error:
            if not any(text in str(error) for text in _NO_AGENT):
                raise ValueError(f"{where} refuses the job: {error}") from error
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{where} had no agent to run the job within {AGENT_WAIT_S:g} s: {error}; see "
                    "dashboard_agent.log on the head node"
                ) from error
        time.sleep(POLL_S)


def _end(client: JobSubmissionClient, submission_id: str) -> JobStatus | None:
    """The status of a job once it has ended; None where the server stays away `LOST_AFTER_S`."""
    heard = time.monotonic()
    while True:
        try:
            status = client.get_job_status(submission_id)
            heard = time.monotonic()
            if status.is_terminal():
                return status
        except (OSError, RuntimeError):
            if time.monotonic() - heard > LOST_AFTER_S:
                return None
        time.sleep(POLL_S)


async def _follow(client: JobSubmissionClient, submission_id: str) -> None:
    async for lines in client.tail_job_logs(submission_id):
        print(lines, end="", flush=True)
