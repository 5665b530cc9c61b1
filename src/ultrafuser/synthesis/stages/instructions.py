"""Instructions: asked of a topic, or made from examples as strongly or weakly related ones.

All three are asked topic by topic, so each topic gets its part, and a request names what its topic has already.

Source: Ding et al. 2024 (arXiv 2403.08281), Section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ultrafuser.synthesis.domain import Domain
from ultrafuser.synthesis.node import Answer, Item, Node
from ultrafuser.synthesis.parsing import read_instructions
from ultrafuser.synthesis.recipe import StageName, SynthesisRecipe
from ultrafuser.synthesis.stages.ask import EVER_KEPT, Asker, draw, numbered, quotas, spread, topic_values
from ultrafuser.synthesis.stages.base import ItemDraft, View


@dataclass(frozen=True)
class InstructionStage:
    """Instructions of every topic of the lowest level.

    Attributes:
        examples: How many of the topic's instructions a request shows; 0: it goes by the topic alone.
    """

    name: StageName
    topics: StageName
    target: int
    per_request: int
    max_rounds: int
    examples: int
    asker: Asker

    def plan(self, view: View, round: int) -> Iterator[Node]:
        """Requests for what each topic still lacks; where examples are needed, topics that have some share it all."""
        there = view.count_by_parent(self.name, states=EVER_KEPT)
        among = view.count_by_parent("instructions", states=EVER_KEPT) if self.examples else None
        for topic, quota in quotas(view, self.target, self.topics, among=among):
            missing = quota - there.get(topic.key, 0)
            for slot, count in enumerate(spread(missing, self.per_request, round=round, max_rounds=self.max_rounds)):
                yield self._request(view, topic, count, round, slot)

    def _request(self, view: View, topic: Item, count: int, round: int, slot: int) -> Node:
        place = self.asker.place(round, topic.key, slot)
        values = topic_values(view, topic)
        detail: dict[str, object] = {"count": count}
        if self.examples:
            drawn = draw(
                view.items("instructions", states=EVER_KEPT, parent=topic.key), self.examples, f"examples:{place}"
            )
            values["examples"] = numbered([item.text for item in drawn])
            detail["examples"] = [item.key for item in drawn]
        messages = self.asker.ask(
            self.name,
            "instructions",
            count=str(count),
            avoid=self.asker.avoid(view.items(self.name, states=EVER_KEPT, parent=topic.key), place),
            forms=self.asker.forms(place),
            **values,
        )
        return self.asker.node(
            round=round, parent=topic.key, slot=slot, messages=messages, answer="instructions", detail=detail
        )

    def read(self, node: Node, answer: Answer) -> list[ItemDraft]:
        """At most as many instructions as were asked for."""
        texts = read_instructions(answer.text, is_cut=answer.finish_reason == "length")
        return [ItemDraft(text) for text in texts[: node.detail["count"]]]

    def replaced(self, item: Item) -> str | None:
        """Instructions stand beside each other."""
        del item
        return None


def instruction_stages(domain: Domain, recipe: SynthesisRecipe) -> Iterator[InstructionStage]:
    """Instructions, strongly related and weakly related ones, as far as the domain wants them."""
    settings = domain.settings
    names: tuple[StageName, ...] = ("instructions", "strong", "weak")
    for name in names:
        if (share := getattr(settings.shares, name)) > 0:
            yield InstructionStage(
                name=name,
                topics=settings.topic_stages[-1],
                target=math.ceil(settings.records * share * settings.margin - 1e-6),
                per_request=getattr(settings.per_request, name),
                max_rounds=getattr(settings.rounds, name),
                examples=0 if name == "instructions" else settings.examples,
                asker=Asker(name, domain, recipe),
            )
