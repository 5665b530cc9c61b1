"""Responses: what is kept of the instructions is answered, as many as the domain is to have records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from ultrafuser.synthesis.node import Answer, ChatMessage, Item, Node, fraction_of
from ultrafuser.synthesis.parsing import read_text
from ultrafuser.synthesis.recipe import INSTRUCTION_STAGES, StageName
from ultrafuser.synthesis.stages.ask import Asker
from ultrafuser.synthesis.stages.base import ItemDraft, View

POOL: tuple[StageName, ...] = (*INSTRUCTION_STAGES, "complicated", "evolved")


@dataclass(frozen=True)
class ResponseStage:
    """One kept answer for each of `target` instructions; there are more of those, for answers that are dropped."""

    target: int
    samples: int
    max_rounds: int
    asker: Asker
    name: StageName = "responses"

    def plan(self, view: View, round: int) -> Iterator[Node]:
        """Requests for as many instructions as records are missing, drawn from all alike.

        The first round leaves out a part drawn by hash and not the end of the pool, which is one stage's; the share is
        a little larger than needed, as draws scatter, and what is too much is cut.
        """
        missing = self.target - view.count(self.name)
        if missing <= 0:
            return
        waiting = view.without_child(*POOL, child=self.name)
        if round == 0:
            share = 1.01 * missing / max(1, view.count(*POOL))
            waiting = (item for item in waiting if fraction_of(item.key, "responses") < share)
        (style,) = self.asker.ask(self.name, None)
        system = ChatMessage(role="system", content=style.content)
        for item in islice(waiting, missing):
            messages = (system, ChatMessage(role="user", content=item.text))
            for sample in range(self.samples):
                yield self.asker.node(round=round, parent=item.key, slot=sample, messages=messages)

    def read(self, node: Node, answer: Answer) -> list[ItemDraft]:
        """The answer's text."""
        del node
        return [ItemDraft(read_text(answer.text))]

    def replaced(self, item: Item) -> str | None:
        """A response takes no other's place."""
        del item
        return None
