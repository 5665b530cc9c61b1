"""Is an answer right? A program can tell: the answer is cut into its parts, and each part meets its check."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ultrafuser.demo.world.item import Check, Computes, Concludes, Item, Says
from ultrafuser.demo.world.sandbox import Call, run_functions

_NUMBERING = re.compile(r"^\s*(?:\d\)|\d\.(?= ))\s*")
_CONCLUSION = re.compile(r"answer is (-?\d+)\b")


def is_correct(item: Item, answer: str) -> bool:
    """Whether one answer passes all checks of its item; for many use `are_correct`, which is far faster."""
    return are_correct([item], [answer])[0]


def are_correct(items: Sequence[Item], answers: Sequence[str]) -> list[bool]:
    """Whether each answer has exactly the parts its item asks for, in order, each of them right.

    All code among the answers is executed in one sandbox.
    """
    pairs = [_pair(item, answer) for item, answer in zip(items, answers, strict=True)]
    code = list(dict.fromkeys(pair for parts in pairs for pair in parts or () if isinstance(pair[0], Computes)))
    results = run_functions(
        [
            Call(part, check.function, tuple(argument for argument, _ in check.cases))
            for check, part in code
            if isinstance(check, Computes)
        ]
    )
    computed = dict(zip(code, results, strict=True))
    return [parts is not None and all(_holds(pair, computed) for pair in parts) for parts in pairs]


def split_parts(answer: str) -> list[str]:
    """Cut an answer into its parts: a function with its indented lines, or one line of prose.

    Blank lines separate nothing, and numbering in front of a part is dropped.
    """
    parts: list[str] = []
    for line in answer.splitlines():
        if not line.strip():
            continue
        if line[0].isspace() and parts and parts[-1].startswith("def "):
            parts[-1] += "\n" + line.rstrip()
        else:
            parts.append(_NUMBERING.sub("", line.rstrip()))
    return parts


def _pair(item: Item, answer: str) -> list[tuple[Check, str]] | None:
    parts = split_parts(answer)
    return list(zip(item.checks, parts, strict=True)) if len(parts) == len(item.checks) else None


def _holds(pair: tuple[Check, str], computed: dict[tuple[Check, str], list[str] | None]) -> bool:
    check, part = pair
    match check:
        case Says(wanted, others):
            return _has(part, wanted) and not any(_has(part, other) for other in others)
        case Concludes(number):
            return _CONCLUSION.findall(part) == [str(number)]
        case Computes(cases=cases):
            return computed[pair] == [result for _, result in cases]


def _has(part: str, words: str) -> bool:
    return re.search(rf"\b{re.escape(words)}\b", part, re.IGNORECASE) is not None
