"""The outermost layer: a number for every request, a log line, figures, safe headers, and no bug without an answer."""

from __future__ import annotations

import asyncio
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ultrafuser.server.api_error import ApiError, busy
from ultrafuser.server.facts import RequestFacts
from ultrafuser.server.log import log, log_bug
from ultrafuser.server.metrics import Metrics

# On every response. The page needs nothing from elsewhere, and nothing else may frame it or be loaded by it.
SAFE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
CLIENT_GONE = 499  # nginx's number where nobody waited for an answer
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ENCODED = [(name.lower().encode(), value.encode()) for name, value in SAFE_HEADERS.items()]


class Observer:
    """Watches every request from its first to its last byte.

    Args:
        app: What lies behind.
        metrics: Gets the figures.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, watch, and answer for what nobody else answered for."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        facts = RequestFacts(_request_id(scope))
        scope.setdefault("state", {})["facts"] = facts
        status = 0

        async def send_watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [*_ENCODED, (b"x-request-id", facts.request_id.encode())]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        problem: ApiError | None = None
        try:
            await self.app(scope, receive, send_watched)
        except asyncio.CancelledError:  # the server stops and has waited long enough
            facts.problem = "cancelled by the end of the server"
            problem = busy("the server is shutting down")
        except Exception as error:
            facts.problem = type(error).__name__
            log_bug(error, request_id=facts.request_id)
            problem = ApiError(500, f"internal error (request {facts.request_id})", code="internal_error")
        if problem is not None and not status:
            await problem.response()(scope, receive, send_watched)
        # Half a response without its end: uvicorn closes the connection, so the client sees that it broke off.
        self._note(scope, facts, status or CLIENT_GONE)

    def _note(self, scope: Scope, facts: RequestFacts, status: int) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        log("request", method=scope["method"], route=route, **facts.to_dict(status=status))
        self.metrics.responded(route, status, facts, time.monotonic() - facts.begin)


def _request_id(scope: Scope) -> str:
    """The client's own number where it is harmless, else a new one."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
