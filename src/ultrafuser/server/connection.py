"""One connection: what uvicorn leaves open. Slow writers and slow readers are cut off, and protocol errors are JSON.

uvicorn waits for ever for the head of a request, and for ever until a client reads.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ultrafuser.server.api_error import ApiError
from ultrafuser.server.observer import SAFE_HEADERS
from ultrafuser.server.settings import ServerSettings

_LINGER_S = 2.0  # for the rest of a body that nobody wants, so that the client reads why
_SPARE_FILES = 24  # beside connections: the model's files, logs, the event loop's own


class Connection(H11Protocol):
    """A connection with deadlines. `settings` come from the application's state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings: ServerSettings = self.config.app.state.settings  # type: ignore[union-attr]
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse what is too much, else wait for the head of a request."""
        super().connection_made(transport)
        if len(self.connections) > max_connections(self.settings):
            self._refuse(ApiError(503, "too many connections", code="overloaded", headers={"Retry-After": "1"}))
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A head that has begun must end in time."""
        if self.transport.is_closing():
            return
        before = self.cycle
        if self._head_timer is None and (before is None or before.response_complete):
            self._await_head()
        super().data_received(data)
        if self.cycle is not before and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def pause_writing(self) -> None:
        """The client does not read: it has so long."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.settings.deadlines.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def on_response_complete(self) -> None:
        """A body that was not wanted may still be coming, for ever."""
        cycle = self.cycle
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and self.cycle is cycle:
            self.loop.call_later(_LINGER_S, self._end_unwanted_body, cycle)
        elif self.transport.is_closing() and self.transport.get_write_buffer_size():
            # Closing waits until the client has read the rest, be it never.
            self._write_timer = self.loop.call_later(self.settings.deadlines.write_s, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """Idle; or the client has not read the end of its answer, and closing would wait for that."""
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self.settings.deadlines.write_s, self.transport.abort)
        super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, in our words."""
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        message = "the headers of this request are too large" if status == 431 else "this is no HTTP request"
        del msg
        self._refuse(ApiError(status, message, code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        """Answer and close; in the middle of another answer only close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            headers = {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                "Connection": "close",
                **SAFE_HEADERS,
                **(error.headers or {}),
            }
            for event in (
                h11.Response(status_code=error.status_code, headers=list(headers.items())),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self._stop_timers()
        self.transport.close()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.settings.deadlines.read_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        self._refuse(ApiError(408, "the request did not come in time", code="request_timeout"))

    def _end_unwanted_body(self, cycle: Any) -> None:
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self.transport.abort()

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._write_timer = None


def max_connections(settings: ServerSettings) -> int:
    """As many as are allowed, and as files can be opened."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, min(settings.limits.num_connections, soft - _SPARE_FILES))
