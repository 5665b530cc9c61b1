"""Which split a question belongs to: a pure function of its content, so splits can never overlap.

The name a code question gives its function is no content: the same task under another name stays in its split.
"""

from __future__ import annotations

import hashlib
import re

from ultrafuser.demo.world.item import Split

HELD_OUT_PERCENT = 12  # for validation, and as much again for test

_FUNCTION_NAME = re.compile(r"\bfunction \w+")


def split_of(question: str) -> Split:
    """The split of a question that stands alone (a mixed question has the split of its parts)."""
    content = _FUNCTION_NAME.sub("function", question)
    bucket = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") % 100
    if bucket < HELD_OUT_PERCENT:
        return "test"
    return "validation" if bucket < 2 * HELD_OUT_PERCENT else "train"
