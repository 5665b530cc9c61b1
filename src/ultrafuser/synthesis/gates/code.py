"""The gate of code: blocks in Python and JSON have to parse. Nothing is executed; other languages pass."""

from __future__ import annotations

import ast
import json
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from ultrafuser.synthesis.gates.base import GateContext
from ultrafuser.synthesis.gates.texts import blocks
from ultrafuser.synthesis.node import Item
from ultrafuser.synthesis.recipe import GateName

MAX_CHARACTERS = 50_000  # of a block: a longer one is not looked at
_ABOUT_MISTAKES = re.compile(
    r"syntax|indentation ?error|does(?:n['’]t| not) (?:parse|compile|run)|invalid (?:json|python)|malformed|python ?2",
    re.IGNORECASE,
)
_MAGIC = re.compile(r"^[ \t]*[%!][^\n]*$", re.MULTILINE)  # of notebooks
_JSON_COMMENT = re.compile(r"(?m)^\s*(?://|#)[^\n]*$|(?<=[\s,{\[])//[^\n\"]*$")
_JSON_ELLIPSIS = re.compile(r",?\s*\.\.\.\s*(?=[\]}])|\.\.\.,?")


@dataclass(frozen=True)
class CodeGate:
    """Drops texts with a block of Python or JSON that does not parse."""

    name: GateName = "code"

    def judge(self, item: Item, context: GateContext) -> str | None:
        """A block that does not parse."""
        reason = next(self._faults(item.text), None)
        if reason is None:
            return None
        # Code that is shown for its mistakes is to have them.
        parent = context.parent(item)
        return None if parent is not None and _ABOUT_MISTAKES.search(parent.text) else reason

    @staticmethod
    def _faults(text: str) -> Iterator[str]:
        for block in blocks(text):
            if len(block.code) > MAX_CHARACTERS or not block.code.strip():
                continue
            if block.language in ("python", "py", "python3") and not parses_as_python(block.code):
                yield "Python does not parse"
            if block.language == "json" and not parses_as_json(block.code):
                yield "JSON does not parse"

    def kept(self, item: Item, context: GateContext) -> None:
        """Nothing to remember."""


def parses_as_python(code: str) -> bool:
    """Whether it is Python, a session at its prompt, or a cell of a notebook; with an indent of its own or without."""
    code = textwrap.dedent(code)
    if re.match(r"\s*(?:>>>|In \[\d+\]:)", code):
        code = "\n".join(line[4:] for line in code.splitlines() if line.startswith((">>> ", "... ")))
    return _parses(code) or (_MAGIC.search(code) is not None and _parses(_MAGIC.sub("", code)))


def _parses(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on "\\d" and its like
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def parses_as_json(code: str) -> bool:
    """Whether it is JSON, one value or one a line; comments and "..." for what is left out are let pass."""
    plain = _JSON_ELLIPSIS.sub("", _JSON_COMMENT.sub("", code))
    for text in (code, plain):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            continue
        return True
    try:
        return all(isinstance(json.loads(line), dict | list) for line in code.splitlines() if line.strip())
    except (ValueError, RecursionError):
        return False
