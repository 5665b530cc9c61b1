"""Request bodies: JSON only, of bounded size, in bounded time, read strictly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from ultrafuser.server.api_error import ApiError
from ultrafuser.server.settings import ServerSettings
from ultrafuser.server.strict_json import parse_json


class StrictRequest(Request):
    """A request whose body is read with limits and a deadline."""

    async def body(self) -> bytes:
        """The body. Raises ApiError: not JSON by its own account, too large, too slow, or broken off."""
        if not hasattr(self, "_body"):
            settings: ServerSettings = self.app.state.settings
            self._check_type()
            try:
                async with asyncio.timeout(settings.deadlines.read_s):
                    self._body = await self._read(settings.limits.body_bytes)
            except TimeoutError:
                message = f"the body did not come within {settings.deadlines.read_s:g} s"
                raise ApiError(408, message, code="request_timeout", headers={"Connection": "close"}) from None
        return self._body

    async def json(self) -> Any:
        """The body as an object. Raises ApiError: it is no JSON, or one that `parse_json` refuses."""
        if not hasattr(self, "_json"):
            try:
                self._json = parse_json(await self.body())
            except ValueError as error:
                raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from error
        return self._json

    def _check_type(self) -> None:
        kind, *parameters = (part.strip().lower() for part in self.headers.get("content-type", "").split(";"))
        charsets = [value for value in parameters if value.startswith("charset")]
        if kind != "application/json" or any(value.partition("=")[2].strip('"') != "utf-8" for value in charsets):
            raise ApiError(415, "send JSON as UTF-8, with Content-Type: application/json", code="unsupported_type")
        if self.headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "compressed bodies are not supported", code="unsupported_type")

    async def _read(self, limit: int) -> bytes:
        declared = self.headers.get("content-length", "0")
        if not declared.isdigit() or len(declared) > 20 or int(declared) > limit:
            raise _too_large(limit)
        body = bytearray()
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the body broke off", code="incomplete_body")
            body += message.get("body", b"")
            if len(body) > limit:
                raise _too_large(limit)
            if not message.get("more_body", False):
                return bytes(body)


class StrictRoute(APIRoute):
    """A route whose requests are strict."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI calls it."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if self.body_field is not None:
                request = StrictRequest(request.scope, request.receive)
                if not (await request.body()).strip():
                    raise ApiError(400, "the body is empty: send a JSON object", code="invalid_json")
            return await handler(request)

        return handle


def _too_large(limit: int) -> ApiError:
    message = f"the body is over {limit:,} bytes"
    return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
