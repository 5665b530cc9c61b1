"""A scripted server for the chat page, and a browser: the page's files, and answers that a test writes.

It speaks the API of `ultrafuser serve` as far as the page uses it, and can do what a good server rarely does: wait for
the test before each token, refuse, fail in the middle, break off, disappear and come back.
"""

from __future__ import annotations

import json
import select
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

import pytest

NAMES = ("text", "code", "math")
PAGE = files("ultrafuser") / "server" / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# The policy of `ultrafuser.server`.
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
BROWSER_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

Token = tuple[str, Sequence[float]]


@dataclass(frozen=True)
class Reply:
    """What the server answers to one request.

    Attributes:
        tokens: Text and weights of each.
        held: Wait for `ScriptedServer.release` before each token.
        gap_s: Wait that long before each token.
        finish_reason: Of the last chunk.
        status: Another than 200 refuses the request, with `message` and `retry_after_s`.
        fails_after: After so many tokens an error comes in the stream, with `message`.
        breaks_after: After so many tokens the connection is cut.
    """

    tokens: Sequence[Token] = (("Good", (0.7, 0.2, 0.1)), (" day", (0.6, 0.3, 0.1)))
    held: bool = False
    gap_s: float = 0.0
    finish_reason: str = "stop"
    status: int = 200
    message: str = ""
    retry_after_s: int | None = None
    fails_after: int | None = None
    breaks_after: int | None = None


class ScriptedServer(ThreadingHTTPServer):
    """Serves the page; answers requests with `replies` in order, then with the default one."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.replies: list[Reply] = []
        self.bodies: list[dict[str, Any]] = []  # of the requests, as they came
        self.key: str | None = None
        self.specialists = NAMES
        self.num_gone = 0  # clients that left before their answer was complete
        self._released = threading.Semaphore(0)
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def release(self, number: int = 1) -> None:
        """Let so many held tokens go."""
        self._released.release(number)

    def take(self, body: dict[str, Any]) -> Reply:
        with self._lock:
            self.bodies.append(body)
            return self.replies.pop(0) if self.replies else Reply()

    def await_gone(self, number: int, within_s: float = 5.0) -> None:
        """Wait until so many clients have left."""
        end = time.monotonic() + within_s
        while self.num_gone < number:
            assert time.monotonic() < end, f"{self.num_gone} clients left, not {number}"
            time.sleep(0.01)


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def log_message(self, format: str, *args: Any) -> None:
        """A test's output is its own."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            if self._is_allowed():
                fusion = {"specialists": self.server.specialists, "max_context": 2048}
                self._send_json(200, {"object": "list", "data": [{"id": "demo", "object": "model", "fusion": fusion}]})
            return
        name = "index.html" if self.path == "/" else self.path.removeprefix("/page/")
        file = PAGE / name
        if "/" in name or not file.is_file():
            self._send_error(404, "no such page")
            return
        self._send(200, file.read_bytes(), TYPES[name[name.rindex(".") :]])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            return
        assert self.path == "/v1/chat/completions"
        reply = self.server.take(body)
        if reply.status != 200:
            after = {} if reply.retry_after_s is None else {"Retry-After": str(reply.retry_after_s)}
            self._send_error(reply.status, reply.message, after)
            return
        try:
            self._stream(reply, body)
        except (BrokenPipeError, ConnectionResetError):
            self.server.num_gone += 1

    def _is_allowed(self) -> bool:
        if self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return True
        self._send_error(401, "This server needs an API key in the Authorization header.")
        return False

    def _stream(self, reply: Reply, body: Mapping[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        self.close_connection = True
        self._event(self._chunk({"role": "assistant", "content": ""}))
        for index, (text, weights) in enumerate(reply.tokens):
            if index == reply.fails_after:
                self._event({"error": {"message": reply.message, "type": "server_error", "param": None, "code": None}})
                return
            if index == reply.breaks_after:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self._wait(reply)
            fusion = [{"token_id": index, "text": text, "weights": self._weights(weights, body)}]
            self._event(self._chunk({"content": text}, fusion=fusion))
        self._event(self._chunk({}, finish_reason=reply.finish_reason))
        rows = [self._weights(weights, body) for _, weights in reply.tokens]
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        # A test may script weights that do not fit the names.
        usage = {"completion_tokens": len(rows), "fusion_mean": dict(zip(self.server.specialists, means, strict=False))}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _weights(self, weights: Sequence[float], body: Mapping[str, Any]) -> list[float]:
        """As asked for: the scripted ones, or those of the override, or without those left out."""
        override, without = body["fusion"].get("override"), body["fusion"].get("without", [])
        if override is not None:
            return [override.get(name, 0.0) for name in self.server.specialists]
        if not without:
            return list(weights)
        names = self.server.specialists
        kept = [0.0 if name in without else weight for name, weight in zip(names, weights, strict=True)]
        return [weight / sum(kept) for weight in kept]

    def _wait(self, reply: Reply) -> None:
        """Until the next token may go; a client that has left meanwhile raises BrokenPipeError."""
        time.sleep(reply.gap_s)
        while True:
            if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                raise BrokenPipeError
            if not reply.held or self.server._released.acquire(timeout=0.02):
                return

    def _chunk(self, delta: Mapping[str, str], **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": None, **more}
        return {"object": "chat.completion.chunk", "model": "demo", "choices": [choice]}

    def _event(self, data: Mapping[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")
        self.wfile.flush()

    def _send_error(self, status: int, message: str, headers: Mapping[str, str] = {}) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self._send_json(status, {"error": error}, headers)

    def _send_json(self, status: int, value: Any, headers: Mapping[str, str] = {}) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", headers)

    def _send(self, status: int, content: bytes, kind: str, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def scripted_server(port: int = 0) -> Iterator[ScriptedServer]:
    """A server in a thread of its own; leaving the block closes its port."""
    server = ScriptedServer(port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def real_browser() -> Iterator[Any]:
    """Chromium, driven by Playwright; skips the test where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=list(BROWSER_OPTIONS))
        try:
            yield browser
        finally:
            browser.close()
