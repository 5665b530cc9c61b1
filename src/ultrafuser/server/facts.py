"""What is known about one request of a client, for its log line and the metrics; never what was said in it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope


@dataclass(slots=True)
class RequestFacts:
    """Filled in on the way of a request through the server.

    Attributes:
        request_id: In the response's X-Request-Id, too.
        key_id: A hash of the key, cut short; "-" without one.
        prompt_tokens, completion_tokens: As in the usage.
        first_token_s: From submission; None before.
        finish_reasons: One per finished choice.
        problem: What went wrong, in the engine's words or ours; for the log alone.
        client_gone: The client went away before its answer was whole.
        begin: When it came, on the monotonic clock.
    """

    request_id: str
    key_id: str = "-"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    problem: str | None = None
    client_gone: bool = False
    begin: float = field(default_factory=time.monotonic)

    def to_dict(self, *, status: int) -> dict[str, Any]:
        """The fields of the log line."""
        fields = {
            "request_id": self.request_id,
            "key": self.key_id,
            "status": status,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "finish_reasons": self.finish_reasons or None,
            "first_token_s": None if self.first_token_s is None else round(self.first_token_s, 4),
            "total_s": round(time.monotonic() - self.begin, 4),
            "problem": self.problem,
            "client_gone": self.client_gone or None,
        }
        return {name: value for name, value in fields.items() if value not in (None, 0) or name == "status"}


def facts_of(scope: Scope) -> RequestFacts:
    """The facts of the request that a scope belongs to."""
    facts: RequestFacts = scope["state"]["facts"]
    return facts
