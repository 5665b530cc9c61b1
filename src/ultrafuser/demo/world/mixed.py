"""Mixed questions: several parts of different domains, put together in ways that no training record uses.

Training joins two questions by one line break and their answers likewise. Here the question is put together
otherwise, or has a part from every domain; the answer is always the parts' answers, one after the other, each on
its own line or lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ultrafuser.demo.world.item import Item


@dataclass(frozen=True, slots=True)
class Composition:
    """A way to put `num_parts` questions together; `near` ones differ little from the join used in training."""

    name: str
    num_parts: int
    template: str
    near: bool


COMPOSITIONS = (
    Composition("three lines", 3, "{}\n{}\n{}", near=True),
    Composition("blank line", 2, "{}\n\n{}", near=True),
    Composition("one line", 2, "{} {}", near=True),
    Composition("and line", 2, "{}\nAnd: {}", near=True),
    Composition("numbered", 2, "1) {}\n2) {}", near=False),
    Composition("first then", 2, "First: {} Then: {}", near=False),
)


def compose_mixed(composition: Composition, parts: Sequence[Item]) -> Item:
    """One item that asks all parts in order.

    Args:
        composition: How the questions are put together.
        parts: As many items as the composition takes, no two of one domain.
    """
    assert len({part.domain for part in parts}) == len(parts) == composition.num_parts
    return Item(
        domain="mixed",
        kind=composition.name,
        question=composition.template.format(*(part.question for part in parts)),
        answer="\n".join(part.answer for part in parts),
        checks=tuple(check for part in parts for check in part.checks),
    )
