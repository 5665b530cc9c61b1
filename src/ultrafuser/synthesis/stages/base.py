"""What a stage is: it plans requests from what there is, and reads items from the answers.

A stage runs in rounds. `plan` says what is to be asked in a round; when all of that is answered, the gates judge the
new items; then the next round is planned, which asks again for what is missing. A round without requests, or the last
one allowed, ends the stage. Planning depends on the recipe and on items of earlier rounds and stages alone, and yields
nodes in an order of its own, so it can be repeated after a crash and gives the same nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ultrafuser.errors import DataError
from ultrafuser.synthesis.node import Answer, Item, ItemState, Node
from ultrafuser.synthesis.recipe import StageName


class UnreadableError(DataError):
    """An answer out of which a stage can read nothing; the message says why, in a few words that can be counted."""


@dataclass(frozen=True, slots=True)
class ItemDraft:
    """An item as a stage reads it: its node, number, domain, stage and round are filled in by the pipeline.

    Attributes:
        parent: Key of the item it was made from; None: that of its node.
    """

    text: str
    detail: dict[str, Any] = field(default_factory=dict)
    parent: str | None = None


class View(Protocol):
    """What a stage may know: the items of its domain. Reading takes little memory, however many there are."""

    def items(
        self, *stages: StageName, states: tuple[ItemState, ...] = ("kept",), parent: str | None = None
    ) -> Iterator[Item]:
        """Items of these stages in the order of (round, key); with `parent` only those made from it."""
        ...

    def item(self, key: str) -> Item:
        """One item, of whatever state."""
        ...

    def count(self, *stages: StageName, states: tuple[ItemState, ...] = ("kept",)) -> int:
        """How many items there are."""
        ...

    def count_by_parent(self, *stages: StageName, states: tuple[ItemState, ...] = ("kept",)) -> Mapping[str, int]:
        """The same for every parent that has any; a mapping as large as the number of parents: for topics alone."""
        ...

    def lineage(self, item: Item) -> list[Item]:
        """The item's ancestors, the root first, itself last."""
        ...

    def without_child(self, *of: StageName, child: StageName) -> Iterator[Item]:
        """Kept items of the stages `of` that have no kept item of the stage `child` made from them."""
        ...


class Stage(Protocol):
    """One step of a domain's pipeline."""

    @property
    def name(self) -> StageName:
        """Of the stage."""
        ...

    @property
    def max_rounds(self) -> int:
        """The rounds it has, at most."""
        ...

    def plan(self, view: View, round: int) -> Iterator[Node]:
        """What to ask in this round."""
        ...

    def read(self, node: Node, answer: Answer) -> list[ItemDraft]:
        """The items of an answer, in order. Raises UnreadableError."""
        ...

    def replaced(self, item: Item) -> str | None:
        """The key of the item that this one, now kept, takes the place of; None: it stands beside all others."""
        ...
