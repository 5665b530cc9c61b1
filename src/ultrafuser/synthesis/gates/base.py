"""What a gate is: it looks at one new item and keeps it, or drops it and says why.

Items come in the order of (round, key), those of earlier rounds and stages having been judged, so what is dropped as a
duplicate does not depend on which answer came first. Every verdict is stored with its gate and reason, to be counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ultrafuser.synthesis.node import Item
from ultrafuser.synthesis.recipe import GateName


class Bands(Protocol):
    """Hashes of parts of items' signatures, kept in the store: who has one of them in common?"""

    def candidates(self, scope: str, bands: Sequence[int]) -> list[Item]:
        """Kept items within a scope that share a band, in order of key."""
        ...

    def add(self, scope: str, item: Item, bands: Sequence[int]) -> None:
        """Remember an item that is kept."""
        ...


class GateContext(Protocol):
    """What a gate may know beside the item."""

    bands: Bands

    def parent(self, item: Item) -> Item | None:
        """What the item was made from."""
        ...

    def siblings(self, item: Item) -> list[Item]:
        """Other items of its stage made from the same parent, whatever their state."""
        ...

    def finish_reason(self, item: Item) -> str:
        """How the endpoint says that the answer with this item ended."""
        ...


class Gate(Protocol):
    """One test. `judge` gives the reason to drop an item in a few words that can be counted, or None to keep it.

    `kept` is called for an item that passed every gate, before the next one is judged.
    """

    @property
    def name(self) -> GateName:
        """Of the gate."""
        ...

    def judge(self, item: Item, context: GateContext) -> str | None:
        """Why the item is to be dropped; None if it is not."""
        ...

    def kept(self, item: Item, context: GateContext) -> None:
        """The item passed this gate and all others."""
        ...
