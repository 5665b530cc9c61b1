"""JSON as the standard has it, and within limits: what Python's reader lets pass besides is refused.

Refused: a byte order mark, bytes that are no UTF-8, text after the value, NaN and Infinity (also as 1e999), keys that
come twice, halves of surrogate pairs, the NUL character, deep nesting and very many keys.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

MAX_DEPTH = 64
MAX_KEYS = 1024
_STRINGS_AND_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def parse_json(body: bytes) -> Any:
    """Read a JSON text.

    Raises:
        ValueError: It is none, or beyond the limits; the message says why.
    """
    if not body.strip():
        raise ValueError("the body is empty")
    if body.startswith(b"\xef\xbb\xbf"):
        raise ValueError("the body begins with a byte order mark")
    _check_depth(body)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the body is not UTF-8 (byte {error.start})") from error
    value = json.loads(
        text,
        object_pairs_hook=_object,
        parse_constant=_refuse_constant,
        parse_float=_finite,
        parse_int=_bounded,
    )
    _check_texts(value)
    return value


def _check_depth(body: bytes) -> None:
    """Before the reader recurses; brackets inside strings do not count."""
    depth = 0
    for match in _STRINGS_AND_BRACKETS.finditer(body):
        first = match[0][:1]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"the body is nested more than {MAX_DEPTH} deep")
        elif first in b"]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"an object has more than {MAX_KEYS:,} keys")
    if len(value) < len(pairs):
        raise ValueError("a key comes twice in an object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _bounded(text: str) -> int:
    # Python refuses to read more digits than this, in words about its own settings.
    if len(text) > 100:
        raise ValueError("a number is too large")
    return int(text)


def _check_texts(value: Any) -> None:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if "\0" in item:
                raise ValueError("a string holds the NUL character")
            if any("\ud800" <= character <= "\udfff" for character in item):
                raise ValueError("a string holds half of a surrogate pair")
        elif isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
