"""Servers on this machine that wandb's client takes for its own: one that answers, and ones that do not."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "0123456789abcdef" * 2 + "01234567"  # of the shape that wandb expects


@contextmanager
def refusing() -> Iterator[str]:
    """A port that nobody listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield _address(held)


@contextmanager
def hanging() -> Iterator[str]:
    """Connections are accepted, and that is all."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen(64)
        yield _address(held)


@contextmanager
def answering(*, until: str = "") -> Iterator[tuple[str, list[str]]]:
    """Answers what a run needs; yields its address and the names of the requests so far.

    Args:
        until: the request with which it is gone: it closes its port and its connections.
    """
    server = _Server(("127.0.0.1", 0), _Handler)
    server.until = until
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield _address(server.socket), server.seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _address(held: socket.socket) -> str:
    return f"http://127.0.0.1:{held.getsockname()[1]}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    until = ""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.seen: list[str] = []
        self.gone = False
        self.runs: dict[str, str] = {}  # id by name

    def handle_error(self, *_: object) -> None:
        """A client that has left is none of ours."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        name, answer = self.path.rsplit("/", 1)[-1], {}
        if name == "graphql":
            request = json.loads(body)
            # The check of the key has no name of its own.
            name = request.get("operationName") or ("Viewer" if "viewer" in request["query"] else "unnamed")
            variables = request.get("variables") or {}
            answer = {"data": _ANSWERS.get(name, lambda _: {})(variables)}
            if name == "UpsertBucket":
                name = f"UpsertBucket {variables['name']}"
        self.server.seen.append(name)
        if name == self.server.until:
            self.server.gone = True
            self.server.shutdown()
            self.server.socket.close()
        if self.server.gone:
            self.close_connection = True
            return
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST  # noqa: N815


def _bucket(variables: dict[str, str]) -> dict[str, object]:
    project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
    bucket = {"id": "b", "name": variables["name"], "displayName": "", "description": "", "config": "{}",
              "sweepName": None, "project": project, "historyLineCount": 0}  # fmt: skip
    return {"upsertBucket": {"bucket": bucket, "inserted": True}}


_ANSWERS = {
    "UpsertBucket": _bucket,
    "CreateRunFiles": lambda _: {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}},
    "RunResumeStatus": lambda _: {"model": None},
    "Viewer": lambda _: {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}",
                                    "teams": {"edges": []}}},
}  # fmt: skip
