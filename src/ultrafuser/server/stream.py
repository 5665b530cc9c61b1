"""Answers on their way out: as server-sent events or whole, and an end to all work when the client goes away.

uvicorn tells of a lost connection only those who ask, so somebody asks all the time: an answer that nobody reads must
not hold slots, and before its first token nothing would be sent that could fail.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ultrafuser.server.answering import Answering
from ultrafuser.server.api_error import ApiError
from ultrafuser.server.compose import Composer
from ultrafuser.server.facts import facts_of
from ultrafuser.server.replies import as_json


class WholeAnswer(Response):
    """An answer in one piece."""

    media_type = "application/json"

    def __init__(self, answering: Answering, composer: Composer) -> None:
        super().__init__()
        self.answering, self.composer = answering, composer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wait for the answer, then send it. Raises ApiError."""
        if await _unless_gone(scope, receive, self.answering, self._collect()):
            await JSONResponse(as_json(self.composer.whole()))(scope, receive, send)

    async def _collect(self) -> None:
        async for choice, event in self.answering.events():
            self.composer.add(choice, event)


class StreamedAnswer(Response):
    """An answer as server-sent events, one JSON object each."""

    media_type = "text/event-stream"

    def __init__(self, answering: Answering, composer: Composer) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]  # not known
        self.answering, self.composer = answering, composer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what comes. Raises ApiError while nothing is sent; later an error is the last event."""
        await _unless_gone(scope, receive, self.answering, self._send(send))

    async def _send(self, send: Send) -> None:
        started = False
        async for data in self._chunks():
            if not started:  # with the first token: until then a failure can have a status of its own
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                started = True
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncIterator[bytes]:
        started = False
        try:
            async for choice, event in self.answering.events():
                if not started:
                    for chunk in self.composer.opening():
                        yield _sse(chunk)
                    started = True
                self.composer.add(choice, event)
                if self.composer.says_something(event):
                    yield _sse(self.composer.chunk(choice, event))
        except ApiError as error:
            if not started:
                raise
            yield _data(error.body())
            return
        if self.composer.with_usage:
            yield _sse(self.composer.closing())
        yield b"data: [DONE]\n\n"


class NoAnswer(Response):
    """For a client that went away before the engine heard of its request."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send nothing."""
        del receive, send
        facts_of(scope).client_gone = True


async def _unless_gone(scope: Scope, receive: Receive, answering: Answering, work: Coroutine[Any, Any, None]) -> bool:
    """Send an answer, and drop it when the client goes away; whether it was sent. The engine holds nothing then."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        facts_of(scope).client_gone = True
        return False
    finally:
        answering.cancel()
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _sse(chunk: BaseModel) -> bytes:
    return _data(as_json(chunk))


def _data(value: Any) -> bytes:
    # A line break inside a string is written \n, so an event is always one line.
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n".encode()
