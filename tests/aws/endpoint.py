"""An HTTP server in the place of AWS that does what a test tells it, over real sockets."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

HANG = "hang"
PASS = "pass"

Answer = str | int | tuple[int, str, str]
"""`HANG`, `PASS` (on to what is behind), a status, or a status with an error code and a message."""


class Endpoint:
    """Answers requests from a list of answers, the last of which stays; passes on to `behind` without one.

    Attributes:
        requests: Path and body of every request, in order of arrival.
        answered: How many were answered.
    """

    def __init__(self, behind: str, *answers: Answer) -> None:
        self._behind = urlsplit(behind)
        self._answers: list[Answer] = list(answers)
        self._lock = threading.Lock()
        self._released = threading.Event()
        self.requests: list[tuple[str, bytes]] = []
        self.answered = 0
        self.connections = 0
        self.on_request: Callable[[], object] = lambda: None

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"endpoint": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def answers(self, *answers: Answer) -> None:
        """Answer the next requests like this, and all after them like the last of these."""
        with self._lock:
            self._answers = list(answers)

    def hangs(self) -> None:
        """Answer nothing until released."""
        self.answers(HANG)

    def release(self) -> None:
        """Pass on what hangs and what comes."""
        self.answers(PASS)
        self._released.set()

    def next_answer(self) -> Answer:
        with self._lock:
            if not self._answers:
                return PASS
            return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    endpoint: Endpoint

    def log_message(self, *_: object) -> None: ...

    def setup(self) -> None:
        super().setup()
        self.endpoint.connections += 1

    def do_POST(self) -> None:
        endpoint = self.endpoint
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = endpoint.next_answer()
        endpoint.requests.append((self.path, body))
        endpoint.on_request()
        if answer == HANG:
            endpoint._released.wait()
            answer = PASS
        try:
            if isinstance(answer, str):
                self._pass_on(body)
            else:
                status, code, message = (answer, "InternalError", "") if isinstance(answer, int) else answer
                self._refuse(status, code, message)
        except ConnectionError:  # the client did not wait
            self.close_connection = True
        endpoint.answered += 1

    def _refuse(self, status: Any, code: str, message: str) -> None:
        if "json" in self.headers.get("Content-Type", "") or "@connections" in self.path:
            content, kind = f'{{"__type": "{code}", "message": "{message}"}}', "application/x-amz-json-1.0"
        else:
            content, kind = (
                f"<ErrorResponse><Error><Code>{code}</Code><Message>{message}</Message></Error></ErrorResponse>",
                "text/xml",
            )
        self._answer(status, {"Content-Type": kind, "x-amzn-ErrorType": code}, content.encode())

    def _pass_on(self, body: bytes) -> None:
        behind = http.client.HTTPConnection(self.endpoint._behind.hostname or "", self.endpoint._behind.port)
        try:
            behind.request("POST", self.path, body, dict(self.headers.items()))
            answer = behind.getresponse()
            self._answer(answer.status, {"Content-Type": answer.headers["Content-Type"]}, answer.read())
        finally:
            behind.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def posted(endpoint: Endpoint) -> list[tuple[str, Any]]:
    """Return the connection and the message of every post."""
    return [(path.rpartition("/")[2], json.loads(body)) for path, body in endpoint.requests]


def told(endpoint: Endpoint) -> list[tuple[str, str, Any]]:
    return [(connection, message["operation"], message["metadata"]) for connection, message in posted(endpoint)]
