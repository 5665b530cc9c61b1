"""Topics: meta-topics of the domain, sub-topics of each of those, and finer ones where sub-topics are too few.

Source: Ding et al. 2024 (arXiv 2403.08281), Section 3.2: a name of 2 to 5 words, relevance, a use case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ultrafuser.synthesis.domain import Domain
from ultrafuser.synthesis.node import Answer, Item, Node
from ultrafuser.synthesis.parsing import read_topics
from ultrafuser.synthesis.recipe import StageName, SynthesisRecipe
from ultrafuser.synthesis.stages.ask import Asker, quotas, spread, topic_values
from ultrafuser.synthesis.stages.base import ItemDraft, View


@dataclass(frozen=True)
class TopicStage:
    """One level of topics, below `above` or, where that is None, below the domain itself."""

    name: StageName
    above: StageName | None
    target: int
    per_request: int
    max_rounds: int
    asker: Asker

    def plan(self, view: View, round: int) -> Iterator[Node]:
        """Requests for what each topic above still lacks, naming what it has."""
        there = view.count_by_parent(self.name)
        if self.above is None:
            yield from self._requests(view, None, self.target - view.count(self.name), round)
        else:
            for above, quota in quotas(view, self.target, self.above):
                yield from self._requests(view, above, quota - there.get(above.key, 0), round)

    def _requests(self, view: View, above: Item | None, missing: int, round: int) -> Iterator[Node]:
        parent = above.key if above is not None else None
        values = topic_values(view, above) if above is not None else {}
        for slot, count in enumerate(spread(missing, self.per_request, round=round, max_rounds=self.max_rounds)):
            avoid = self.asker.avoid(self._known(view, parent), self.asker.place(round, parent, slot))
            messages = self.asker.ask(self.name, "topics", count=str(count), avoid=avoid, **values)
            yield self.asker.node(
                round=round, parent=parent, slot=slot, messages=messages, answer="topics", detail={"count": count}
            )

    def _known(self, view: View, parent: str | None) -> Iterator[Item]:
        """Topics that are there, and those that are elsewhere or were struck: given again they would go again."""
        for item in view.items(self.name, states=("kept", "dropped"), parent=parent):
            if item.state == "kept" or item.gate not in ("length", "refusals"):
                yield item

    def read(self, node: Node, answer: Answer) -> list[ItemDraft]:
        """At most as many topics as were asked for."""
        return [
            ItemDraft(topic.name, {"relevance": topic.relevance, "use_case": topic.use_case})
            for topic in read_topics(answer.text, is_cut=answer.finish_reason == "length")[: node.detail["count"]]
        ]

    def replaced(self, item: Item) -> str | None:
        """Topics stand beside each other."""
        del item
        return None


def topic_stages(domain: Domain, recipe: SynthesisRecipe) -> Iterator[TopicStage]:
    """The levels of topics that a domain has."""
    settings = domain.settings
    above: StageName | None = None
    for name in settings.topic_stages:
        yield TopicStage(
            name=name,
            above=above,
            target=getattr(settings, name),
            per_request=getattr(settings.per_request, name),
            max_rounds=getattr(settings.rounds, name),
            asker=Asker(name, domain, recipe),
        )
        above = name
