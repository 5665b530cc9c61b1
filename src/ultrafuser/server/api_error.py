"""Errors as OpenAI writes them: a status and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ultrafuser.errors import BusyError, DataError, RequestError, TemplateError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_SHOWN_CHARACTERS = 300  # of a message: it may quote what a client sent


class ApiError(HTTPException):
    """Something a client is told; never the text of a bug.

    Args:
        status: HTTP status.
        message: What is wrong, with which value, and what to do.
        param: The field at fault.
        code: A word for programs.
        headers: Further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers) if headers else None)
        self.message, self.param, self.code = message, param, code

    def body(self) -> dict[str, Any]:
        """The response as an object."""
        default = "invalid_request_error" if self.status_code < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status_code, default),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The response itself."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def busy(message: str) -> ApiError:
    """The server is full or going down: 503, and when to come again."""
    return ApiError(503, message, code="overloaded", headers={"Retry-After": "1"})


def engine_failed(detail: str, request_id: str) -> ApiError:
    """The engine gave up on a request; `detail` is for the log alone, but tells whether memory ran out."""
    if "memory" in detail.lower():
        message = f"not enough memory for this request now (request {request_id}): ask for less, or try again"
        return ApiError(503, message, code="out_of_memory", headers={"Retry-After": "1"})
    return ApiError(500, f"the engine failed on this request (request {request_id})", code="engine_error")


def from_ours(error: Exception) -> ApiError:
    """An error of the engine's interface as a client should see it; anything else is raised again."""
    if isinstance(error, BusyError):
        return busy(str(error))
    if isinstance(error, RequestError | DataError | TemplateError):
        return ApiError(400, shorten(str(error)), code="invalid_request")
    raise error


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The first thing that pydantic found wrong, with the field it is in."""
    # Of a union all members complain; the one that read deepest knows best what was meant.
    error = max(errors, key=lambda error: len(error["loc"]))
    place = [str(part) for part in error["loc"] if part != "body"]
    param = ".".join(place) or None
    if error["type"] == "extra_forbidden":
        message = f"field {param!r} is not supported: leave it out"
        return ApiError(400, shorten(message), param=shorten(param or ""), code="unsupported_field")
    message = f"{param}: {error['msg']}" if param else str(error["msg"])
    return ApiError(400, shorten(message), param=param and shorten(param), code="invalid_value")


def shorten(text: str) -> str:
    """Text of bounded length in one line, for messages that quote a client."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."
