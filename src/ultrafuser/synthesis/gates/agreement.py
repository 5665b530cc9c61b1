"""The gate of agreement: of several sampled answers, one is kept whose conclusion another comes to as well.

Numbers are compared exactly, other conclusions by their text in one spelling. Two answers that say the same in forms
that only algebra could reconcile count as disagreeing: that loses a record, and lets no wrong one in.

Source: Wang et al. 2022 (self-consistency, arXiv 2203.11171).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ultrafuser.data.conclusions import conclusion, plain_number
from ultrafuser.synthesis.gates.base import GateContext
from ultrafuser.synthesis.node import Item
from ultrafuser.synthesis.recipe import GateName

_DROPPED = re.compile(
    r"\\(?:[,;!: ]|(?:left|right|displaystyle|quad|qquad|text|mathrm|mathbf|textbf|operatorname)(?![A-Za-z]))"
)
_FRACTION = re.compile(r"\\[dt]?frac\{?(-?\d+)\}?\{?(\d+)\}?")


@dataclass(frozen=True)
class AgreementGate:
    """Keeps the first of the answers of one round that agree, and drops the others."""

    name: GateName = "agreement"

    def judge(self, item: Item, context: GateContext) -> str | None:
        """No conclusion, no other answer that shares it, or one that is kept already."""
        own = comparable(item.text)
        others = [other for other in context.siblings(item) if other.round == item.round]
        if any(other.state == "kept" for other in others):
            return "spare sample"
        if own is None:
            return "no conclusion"
        if not others:
            return "no second sample"
        return None if any(comparable(other.text) == own for other in others) else "samples disagree"

    def kept(self, item: Item, context: GateContext) -> None:
        """Nothing to remember."""


def comparable(text: str) -> str | None:
    """What a solution concludes, in a form that is equal for equal conclusions in most spellings."""
    found = conclusion(text)
    if found is None:
        return None
    spelt = _FRACTION.sub(r"\1/\2", _DROPPED.sub("", found)).replace("\\%", "%").replace("^\\circ", "°")
    spelt = re.sub(r"[\s{}$]", "", spelt).rstrip(".").casefold()
    number = plain_number(spelt.removesuffix("%"))
    if number is None:
        number = plain_number(re.sub(r"^[a-z]=", "", spelt))
    if number is None:
        return spelt or None
    return f"{number}%" if spelt.endswith("%") else str(number)
