"""The code domain: small Python functions that do one or two things to their argument, in order."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ultrafuser.demo.world.item import Computes, Item

TWO_STEPS_SHARE = 0.75

FUNCTIONS = ("calc", "run", "solve", "change", "make", "work", "turn", "apply")


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing to do: how the question says it, the expression that does it, and the same as a callable.

    ``{k}`` stands for a constant; the callable takes the argument and the constant.
    """

    phrase: str
    expression: str
    apply: Callable[[Any, int], Any]
    ends: bool = False  # the result is of another type, so nothing can follow


@dataclass(frozen=True, slots=True)
class Family:
    """Operations on one type of argument, and arguments to try them on."""

    name: str
    argument: str
    operations: tuple[Operation, ...]
    arguments: tuple[Any, ...]


FAMILIES = (
    Family(
        "number",
        "a number n",
        (
            Operation("add {k}", "n + {k}", lambda n, k: n + k),
            Operation("subtract {k}", "n - {k}", lambda n, k: n - k),
            Operation("multiply by {k}", "n * {k}", lambda n, k: n * k),
            Operation("take the remainder by {k}", "n % {k}", lambda n, k: n % k),
            Operation("square it", "n * n", lambda n, _: n * n),
            Operation("change the sign", "-n", lambda n, _: -n),
            Operation("make it positive", "abs(n)", lambda n, _: abs(n)),
        ),
        (0, 3, 10, -4, 17),
    ),
    Family(
        "list",
        "a list a",
        (
            Operation("add {k} to each item", "[v + {k} for v in a]", lambda a, k: [v + k for v in a]),
            Operation("multiply each item by {k}", "[v * {k} for v in a]", lambda a, k: [v * k for v in a]),
            Operation("keep items above {k}", "[v for v in a if v > {k}]", lambda a, k: [v for v in a if v > k]),
            Operation("keep items below {k}", "[v for v in a if v < {k}]", lambda a, k: [v for v in a if v < k]),
            Operation("keep even items", "[v for v in a if v % 2 == 0]", lambda a, _: [v for v in a if v % 2 == 0]),
            Operation("keep the first {k} items", "a[:{k}]", lambda a, k: a[:k]),
            Operation("drop the first {k} items", "a[{k}:]", lambda a, k: a[k:]),
            Operation("reverse it", "a[::-1]", lambda a, _: a[::-1]),
            Operation("sort it", "sorted(a)", lambda a, _: sorted(a)),
            Operation("take the sum", "sum(a)", lambda a, _: sum(a), ends=True),
            Operation("count the items", "len(a)", lambda a, _: len(a), ends=True),
        ),
        ([], [4, 1, 7, 2], [9, 3, 6, 8, 5, 0, 2, 12, -3, 10]),
    ),
    Family(
        "string",
        "a string s",
        (
            Operation("make it upper case", "s.upper()", lambda s, _: s.upper()),
            Operation("make it lower case", "s.lower()", lambda s, _: s.lower()),
            Operation("reverse it", "s[::-1]", lambda s, _: s[::-1]),
            Operation("repeat it {k} times", "s * {k}", lambda s, k: s * k),
            Operation("keep the first {k} letters", "s[:{k}]", lambda s, k: s[:k]),
            Operation("drop the first {k} letters", "s[{k}:]", lambda s, k: s[k:]),
            Operation("add {k} stars at the end", "s + '*' * {k}", lambda s, k: s + "*" * k),
            Operation("count the letters", "len(s)", lambda s, _: len(s), ends=True),
        ),
        ("", "Hello", "abcDEFghijKLM"),
    ),
)


def draw_code(rng: random.Random) -> Item:
    """A random code item."""
    family = rng.choice(FAMILIES)
    first = rng.choice(family.operations)
    steps = [(first, rng.randint(2, 9))]
    if not first.ends and rng.random() < TWO_STEPS_SHARE:
        steps.append((rng.choice([other for other in family.operations if other is not first]), rng.randint(2, 9)))
    function = rng.choice(FUNCTIONS)
    phrases = ", then ".join(operation.phrase.format(k=k) for operation, k in steps)
    return Item(
        domain="code",
        kind=f"{family.name}, {len(steps)} step{'s'[: len(steps) - 1]}",
        question=rng.choice(
            (
                f"Write a function {function} that takes {family.argument}: {phrases}.",
                f"Write a Python function {function} for {family.argument}. It should {phrases}.",
            )
        ),
        answer=_write(function, family, steps),
        checks=(Computes(function, tuple((repr(x), repr(_apply(steps, x))) for x in family.arguments)),),
    )


def _write(function: str, family: Family, steps: list[tuple[Operation, int]]) -> str:
    variable = family.argument[-1]
    *before, last = [operation.expression.format(k=k) for operation, k in steps]
    lines = [*(f"{variable} = {expression}" for expression in before), f"return {last}"]
    return "\n    ".join([f"def {function}({variable}):", *lines])


def _apply(steps: list[tuple[Operation, int]], value: Any) -> Any:
    for operation, k in steps:
        value = operation.apply(value, k)
    return value
