"""A real S3 server on this machine (moto's), which can be told to misbehave.

It speaks HTTP on a port of its own, so that builders in other processes reach it too. `faults` see
each request (a WSGI environment) before the server does and may answer in its place; `lost_answers`
requests from now on are acted upon, then answered with 503, as a proxy does that lost the answer.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any

from werkzeug.serving import make_server

from tests.support.lazy import DomainDispatcherApplication, botocore_session, create_backend_app

BUCKET = "caches"
Request = dict[str, Any]
Answer = tuple[str, bytes]

SLOW_DOWN = (
    "503 Slow Down",
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
)
NOT_FOUND = ("404 Not Found", b"<Error><Code>NoSuchKey</Code><Message>late</Message></Error>")


class S3Server:
    """A server with one bucket; `url` is its endpoint, `requests` what it was asked."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.faults: list[Callable[[Request], Answer | None]] = []
        self.lost_answers = 0
        self._app: Any = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find the server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # the store's own retries are what is tested
        }

    def make_bucket(self) -> None:
        """Create the bucket; the environment is set."""
        client: Any = botocore_session.get_session().create_client("s3")
        client.create_bucket(Bucket=BUCKET)
        client.close()

    def behave(self) -> None:
        """Forget requests and faults."""
        self.requests.clear()
        self.faults.clear()
        self.lost_answers = 0

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, request: Request, start: Callable[..., Any]) -> Iterable[bytes]:
        self.requests.append(f"{request['REQUEST_METHOD']} {request['PATH_INFO']}")
        for fault in self.faults:
            answer = fault(request)
            if answer is not None:
                request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
                return _say(answer, request, start)
        if self.lost_answers:
            self.lost_answers -= 1
            list(self._app(request, lambda *_: None))
            return _say(SLOW_DOWN, request, start)
        return self._app(request, start)


def at_first(
    count: int, answer: Answer, method: str = "", name: str = ""
) -> Callable[[Request], Answer | None]:
    """A fault: give this answer to the first `count` requests of a method for a name's part."""
    left = count

    def fault(request: Request) -> Answer | None:
        nonlocal left
        meant = method in ("", request["REQUEST_METHOD"]) and name in request["PATH_INFO"]
        if not meant or left == 0:
            return None
        left -= 1
        return answer

    return fault


def _say(answer: Answer, request: Request, start: Callable[..., Any]) -> Iterable[bytes]:
    status, body = answer
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [b"" if request["REQUEST_METHOD"] == "HEAD" else body]
