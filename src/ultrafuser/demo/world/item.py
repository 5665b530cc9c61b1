"""An item: one question of the world, its reference answer and what a program verifies about an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Says:
    """A sentence is right if it holds the wanted words and none of the other candidates."""

    wanted: str
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Computes:
    """A function is right if it has this name and maps each argument to its result.

    Attributes:
        function: The name the question asks for.
        cases: Pairs of argument and result, both as Python literals: ``("[1, 2]", "3")``.
    """

    function: str
    cases: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Concludes:
    """A worked solution is right if it concludes, once, that the answer is this number."""

    number: int


Check = Says | Computes | Concludes


@dataclass(frozen=True, slots=True)
class Item:
    """A question with its reference answer.

    Attributes:
        domain: ``text``, ``code``, ``math`` or ``mixed``.
        kind: What sort of question within the domain (``fact``, ``two steps``, ...), for finer reports.
        question: What the user asks.
        answer: The reference answer.
        checks: One per part of the answer, in order; only mixed items have more than one.
    """

    domain: str
    kind: str
    question: str
    answer: str
    checks: tuple[Check, ...]
