"""Free sampling: a chat model goes on where a user's turn begins, and so writes what users ask it.

Wants a local model and an endpoint with `/completions`: chat endpoints begin with the user's turn complete.

Source: Xu et al. 2024 (Magpie, arXiv 2406.08464), Section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ultrafuser.synthesis.node import Answer, Item, Node
from ultrafuser.synthesis.parsing import read_text
from ultrafuser.synthesis.recipe import StageName
from ultrafuser.synthesis.stages.ask import EVER_KEPT, Asker
from ultrafuser.synthesis.stages.base import ItemDraft, UnreadableError, View


@dataclass(frozen=True)
class FreeStage:
    """Instructions without a topic, one a request, told apart by their seeds alone."""

    target: int
    max_rounds: int
    prefix: str
    stop: tuple[str, ...]
    asker: Asker
    name: StageName = "free"

    def plan(self, view: View, round: int) -> Iterator[Node]:
        """As many requests as instructions are missing."""
        missing = self.target - view.count(self.name, states=EVER_KEPT)
        for slot in range(missing):
            yield self.asker.node(round=round, parent=None, slot=slot, prompt=self.prefix, stop=self.stop)

    def read(self, node: Node, answer: Answer) -> list[ItemDraft]:
        """The text up to the template's end of turn, which not every server leaves out."""
        del node
        text = answer.text
        for stop in self.stop:
            text = text.partition(stop)[0]
        if not (text := read_text(text)):
            raise UnreadableError("empty answer")
        return [ItemDraft(text)]

    def replaced(self, item: Item) -> str | None:
        """Instructions stand beside each other."""
        del item
        return None
