"""What the doubles of servers have in common: an HTTP server in a thread that answers in JSON and logs nothing."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

Double = TypeVar("Double", bound=ThreadingHTTPServer)


class JsonHandler(BaseHTTPRequestHandler):
    """A handler of requests that has an answer."""

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        """Send a body: bytes as they are, everything else as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = {} if isinstance(body, bytes) else {"content-type": "application/json"}
        self.send_response(status)
        for key, value in {**kind, "content-length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def running(double: Double) -> Iterator[Double]:
    """Run a server in a thread."""
    with double as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
