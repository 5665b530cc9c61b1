"""What an endpoint can do instead of answering, and whose fault that is."""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LONGEST_RETRY_AFTER_S = 86400.0

RefusalKind = Literal[
    "overloaded",  # it says that it has too much to do: no fault of the request
    "unreachable",  # there is no connection: no fault of the request
    "timeout",  # it did not answer in time, for load or for what was asked
    "passing",  # it failed in a way that may pass: an attempt of the request
    "request",  # it cannot or will not answer this request, now and later
    "fatal",  # it will answer none: a wrong key, address or model, or no money left
]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request without an answer.

    Attributes:
        message: One line, with the address and without the key.
        retry_after_s: How long it wants to be left alone.
        may_cost: It may have worked for the answer that did not come, and charge for it.
        is_sure: Of "request": it was recognised as this request's own, so that it says nothing about others.
    """

    kind: RefusalKind
    message: str
    retry_after_s: float | None = None
    may_cost: bool = False
    is_sure: bool = False

    @property
    def is_attempt(self) -> bool:
        """Whether it counts as an attempt of the request."""
        return self.kind in ("timeout", "passing", "request")


def retry_after_s(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """The wait that a response asks for, in seconds or until an HTTP date; None: none that makes sense.

    Args:
        now: Seconds since the epoch; None: read the clock.
    """
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return min(milliseconds / 1000, LONGEST_RETRY_AFTER_S)
    value = headers.get("retry-after")
    if value is None:
        return None
    seconds = _number(value)
    if seconds is None:
        try:
            date = email.utils.parsedate_to_datetime(value)
            seconds = max(0.0, date.timestamp() - (time.time() if now is None else now))
        except (ValueError, TypeError, OverflowError):
            return None
    return min(seconds, LONGEST_RETRY_AFTER_S)


def refusal_of_status(status: int, message: str, code: str | None, retry_s: float | None, help_: Help) -> Refusal:
    """What a status other than 2xx means.

    Args:
        message: What the endpoint says, in one line.
        code: The machine's word for it in OpenAI's form of errors.
        help_: What to tell the user.
    """
    said = f"{help_.where} answers {status}: {message}"
    if code == "insufficient_quota" or status == 402:
        return Refusal("fatal", f"{said} - the account has no money left: add some, then run the same command")
    if status == 429 and _TOO_LARGE.search(message):
        return Refusal("request", said, is_sure=True)
    if status in (429, 503, 529):
        return Refusal("overloaded", said, retry_s)
    if status in (401, 403):
        return Refusal("fatal", f"{said} - {help_.key}")
    if status in (404, 405) or status < 400:
        return Refusal(
            "fatal", f"{said} - check the endpoint's url (up to and including /v1) and model {help_.model!r}"
        )
    if status in (408, 504):
        return Refusal("timeout", said, retry_s, may_cost=True)
    if status >= 500 or status in (409, 425):
        return Refusal("passing", said, retry_s)
    is_overlong = status == 413 or code == "context_length_exceeded" or bool(_OVERLONG.search(message))
    is_filtered = code in ("content_filter", "content_policy_violation")
    return Refusal("request", said, is_sure=is_overlong or is_filtered)


@dataclass(frozen=True, slots=True)
class Help:
    """What a message says about an endpoint: where it is, what its key is, its model."""

    where: str
    key: str
    model: str


_TOO_LARGE = re.compile("request too large", re.IGNORECASE)  # for the tokens per minute: it will never be taken
_OVERLONG = re.compile(
    r"context[ _](length|size|window)|maximum (context|model|sequence)|max_model_len|prompt is too long"
    r"|too many tokens|input is too long|tokens.{0,40}exceed|exceed.{0,40}(token|context)",
    re.IGNORECASE,
)


def one_line(text: str, length: int = 300) -> str:
    """A text for a message: on one line, not too long."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
