"""Rewriting: a part of the instructions is made more complex, and another may be evolved.

What is drawn is drawn by hash of the instruction's key. A rewritten instruction that the gates keep takes the place of
its original; one that fails leaves the original as it was.

Sources: Ding et al. 2024 (arXiv 2403.08281), Section 3.2 (30%: usage context, motives, constraints); Xu et al. 2023
(WizardLM, arXiv 2304.12244), Section 3.1 (in depth and in breadth, failed evolutions dropped). The prompts are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ultrafuser.synthesis.domain import EVOLVE_METHODS
from ultrafuser.synthesis.node import Answer, Item, Node, fraction_of
from ultrafuser.synthesis.parsing import read_instruction
from ultrafuser.synthesis.recipe import INSTRUCTION_STAGES, StageName
from ultrafuser.synthesis.stages.ask import Asker
from ultrafuser.synthesis.stages.base import ItemDraft, View


@dataclass(frozen=True)
class ComplicatedStage:
    """A share of all instructions, made more complex. Later rounds try again what failed."""

    share: float
    max_rounds: int
    angles: tuple[str, ...]
    asker: Asker
    name: StageName = "complicated"

    def plan(self, view: View, round: int) -> Iterator[Node]:
        """A request for every drawn instruction that has no complex form yet."""
        for item in view.without_child(*INSTRUCTION_STAGES, child=self.name):
            if fraction_of(item.key, "complicated") >= self.share:
                continue
            place = self.asker.place(round, item.key, 0)
            angle = self.angles[int(fraction_of(place, "angle") * len(self.angles))]
            messages = self.asker.ask(self.name, "instruction", instruction=item.text, angle=angle)
            yield self.asker.node(round=round, parent=item.key, messages=messages, answer="instruction")

    def read(self, node: Node, answer: Answer) -> list[ItemDraft]:
        """One instruction."""
        del node
        return [ItemDraft(read_instruction(answer.text))]

    def replaced(self, item: Item) -> str | None:
        """The original."""
        return item.parent


@dataclass(frozen=True)
class EvolvedStage:
    """A share of all instructions, evolved. A round is a generation: it evolves what the last one gave in depth."""

    share: float
    breadth: float
    max_rounds: int
    asker: Asker
    name: StageName = "evolved"

    def plan(self, view: View, round: int) -> Iterator[Node]:
        """A request for every drawn instruction, by one of the methods."""
        for item in self._drawn(view, round):
            place = self.asker.place(round, item.key, 0)
            method = "breadth"
            if fraction_of(place, "breadth") >= self.breadth:
                method = EVOLVE_METHODS[int(fraction_of(place, "method") * len(EVOLVE_METHODS))]
            (how,) = self.asker.ask(f"evolve_{method}", None)
            messages = self.asker.ask(self.name, "instruction", instruction=item.text, method=how.content)
            yield self.asker.node(
                round=round, parent=item.key, messages=messages, answer="instruction", detail={"method": method}
            )

    def _drawn(self, view: View, round: int) -> Iterator[Item]:
        if round == 0:
            pool = view.without_child(*INSTRUCTION_STAGES, "complicated", child=self.name)
            return (item for item in pool if fraction_of(item.key, "evolved") < self.share)
        last = view.without_child(self.name, child=self.name)
        return (item for item in last if item.round == round - 1 and item.detail["method"] != "breadth")

    def read(self, node: Node, answer: Answer) -> list[ItemDraft]:
        """One instruction, and the method that made it."""
        return [ItemDraft(read_instruction(answer.text), {"method": node.detail["method"]})]

    def replaced(self, item: Item) -> str | None:
        """The original, if this one is it in more depth; a broader one stands beside it."""
        return None if item.detail["method"] == "breadth" else item.parent
