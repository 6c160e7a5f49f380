"""`emkd submit` goes where it says, waits for an agent, and says so when it loses the dashboard.

Against a small HTTP server that answers as Ray's job server does; `test_cluster.py` has a real one.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.support.lazy import submit

MODULE = "jobs.cluster.submit"

pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # Ray's own call
NO_AGENT = "No available agent to submit job, please try again later."


class JobServer:
    """Takes jobs; `statuses` are what it says of one, in order, the last for ever.

    None closes the server. `refusals` are answers to submissions before it takes one.
    """

    def __init__(self, statuses: list[str | None]) -> None:
        self.statuses = statuses
        self.refusals: list[str] = []
        self.jobs: list[dict[str, Any]] = []
        self.version: dict[str, str] = {"ray_version": "2.60.0"}
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *_: object) -> None:
                return

            def do_GET(self) -> None:
                if self.path == "/api/version":
                    self.say(200, owner.version)
                elif self.path == "/api/jobs/":
                    self.say(200, [])
                elif self.path.endswith("/logs/tail"):
                    self.say(500, "no log")
                else:
                    status = owner.status()
                    if status is None:
                        self.close_connection = True
                        return
                    job = {"type": "SUBMISSION", "entrypoint": "x", "status": status}
                    self.say(200, job)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if owner.refusals:
                    self.say(500, owner.refusals.pop(0))
                    return
                owner.jobs.append(json.loads(body))
                name = owner.jobs[-1]["submission_id"]
                self.say(200, {"job_id": name, "submission_id": name})

            def say(self, code: int, answer: object) -> None:
                data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def status(self) -> str | None:
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{MODULE}.POLL_S", 0.02)
    monkeypatch.setattr(f"{MODULE}.LOST_AFTER_S", 0.2)
    monkeypatch.setattr(f"{MODULE}.AGENT_WAIT_S", 2.0)


@pytest.fixture
def server() -> Iterator[JobServer]:
    running = JobServer(["RUNNING", "SUCCEEDED"])
    yield running
    running.stop()


@pytest.fixture
def other() -> Iterator[JobServer]:
    running = JobServer(["SUCCEEDED"])
    yield running
    running.stop()


def send(address: str | None, wait: bool = True) -> int:
    return submit(
        address=address,
        stage="build",
        command="true",
        identity={},
        working_dir=None,
        driver_cpus=0.0,
        stop_wait_s=1,
        wait=wait,
    )


@pytest.mark.parametrize("variable", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_the_address_that_is_given_wins_over_rays_variables(
    variable: str,
    server: JobServer,
    other: JobServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, other.address)
    assert send(server.address, wait=False) == 0
    assert (len(server.jobs), len(other.jobs)) == (1, 0)
    assert f"to {server.address}\n" in capsys.readouterr().out
    assert (
        send(None, wait=False) == 0
    )  # the variable is still there, and counts where none is given
    assert (len(server.jobs), len(other.jobs)) == (1, 1)
    assert f"to {other.address}\n" in capsys.readouterr().out


@pytest.mark.parametrize(("last", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("STOPPED", 1)])
def test_a_log_that_breaks_off_is_no_end_of_the_job(
    last: str, code: int, server: JobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.statuses = ["PENDING", "RUNNING", None, "RUNNING", last]
    assert send(server.address) == code
    said = capsys.readouterr().out
    assert "its log broke off" in said
    assert said.endswith(f": {last}\n")


def test_a_lost_dashboard_has_an_exit_code_and_a_way_to_follow(
    server: JobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.statuses = ["RUNNING", None]
    assert send(server.address) == 5
    said = capsys.readouterr().out
    name = server.jobs[0]["submission_id"]
    assert "the job may go on" in said
    assert f"ray job logs --follow {name} --address {server.address}" in said
    assert f"ray job status {name} --address {server.address}" in said


def test_an_agent_that_is_not_there_yet_is_waited_for(
    server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.refusals = [NO_AGENT] * 3
    assert send(server.address) == 0
    assert len(server.jobs) == 1
    monkeypatch.setattr(f"{MODULE}.AGENT_WAIT_S", 0.1)
    server.refusals = [NO_AGENT] * 1000
    with pytest.raises(ValueError, match=r"had no agent to run the job within 0\.1 s"):
        send(server.address)


def test_another_refusal_is_not_repeated(server: JobServer) -> None:
    server.refusals = ["File job_agent.py: no space"] * 2
    with pytest.raises(ValueError, match=r"refuses the job: .*no space"):
        send(server.address)
    assert len(server.refusals) == 1


def test_what_is_no_job_server_is_refused_with_its_address(server: JobServer) -> None:
    server.version = {}
    with pytest.raises(ValueError, match=f"{server.address} is no Ray job server"):
        send(server.address)
    server.stop()
    with pytest.raises(ConnectionError, match=server.address):
        send(server.address)
