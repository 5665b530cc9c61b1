"""What tests of the store and the pipeline share: a recipe, nodes, answers, and stages that ask for numbered things."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultrafuser.synthesis.course import DomainPlan
from ultrafuser.synthesis.node import Answer, ChatMessage, Item, Node, Request
from ultrafuser.synthesis.queue import Finished
from ultrafuser.synthesis.recipe import StageName, SynthesisRecipe
from ultrafuser.synthesis.stages.base import ItemDraft, UnreadableError, View
from ultrafuser.synthesis.storage.store import Store


def make_recipe(folder: Path, url: str = "http://127.0.0.1:9/v1", **more: Any) -> SynthesisRecipe:
    """One endpoint, `one`, with more values by `endpoint`, and one domain, `math`; others go in as they are."""
    endpoint = {"url": url, "model": "scripted", **more.pop("endpoint", {})}
    tree = {"name": "test", "folder": str(folder), "endpoints": {"one": endpoint}, "domains": {"math": {}}, **more}
    return SynthesisRecipe.model_validate(tree)


def make_node(slot: int = 0, *, stage: str = "meta_topics", parent: str | None = None, **more: Any) -> Node:
    """A node of the domain math."""
    values = {"domain": "math", "round": 0, "endpoint": "one", "content": f"Say {slot}.", "detail": {}} | more
    messages = (ChatMessage(role="user", content=values["content"]),)
    request = Request(endpoint=values["endpoint"], model="scripted", messages=messages, max_tokens=64)
    return Node(values["domain"], stage, values["round"], parent, slot, request, values["detail"])


def make_answer(text: str = "yes", **more: Any) -> Answer:
    """An answer of 3 and 4 tokens that cost a quarter, which sums without an error."""
    values = {"finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 4, "cost": 0.25, "model": "m"} | more
    return Answer(text=text, **values)


def record_answer(store: Store, node: Node, *texts: str) -> None:
    """The node is planned and answered, with these items."""
    store.plan([node])
    store.record([Finished(node, make_answer(), tuple(ItemDraft(text) for text in texts))])


def judge_all(store: Store, stage: StageName, number: int = 0, gates: Sequence[Any] = (), domain: str = "math") -> None:
    """The round is planned, and its gates have seen every item."""
    store.rounds.add(domain, stage, number, 1)
    while store.rounds.judge(domain, stage, number, gates, lambda _: None):
        continue


@dataclass
class CountingStage:
    """Asks `count` requests in each round, for each kept item of the stage `of`; an answer's words are its items."""

    name: StageName
    count: int
    of: StageName | None = None
    max_rounds: int = 1
    num_words: int = 3
    replaces: bool = False
    reads: list[str] = field(default_factory=list)

    def plan(self, view: View, round: int) -> Iterator[Node]:
        """The requests of a round."""
        for parent in [None] if self.of is None else view.items(self.of, states=("kept", "replaced")):
            for slot in range(self.count):
                content = f"{self.name} {round} {slot} {parent.text if parent else ''}"
                key = parent.key if parent else None
                yield make_node(slot, stage=self.name, parent=key, round=round, content=content)

    def read(self, node: Node, answer: Answer) -> list[ItemDraft]:
        """The first words."""
        self.reads.append(node.key)
        words = answer.text.split()[: self.num_words]
        if not words:
            raise UnreadableError("no words")
        return [ItemDraft(word) for word in words]

    def replaced(self, item: Item) -> str | None:
        """Its parent, if this stage replaces."""
        return item.parent if self.replaces else None


@dataclass
class WordGate:
    """Drops items whose text is, or ends with, one of these; remembers in what order it was asked."""

    words: tuple[str, ...] = ()
    name: str = "length"
    asked: list[str] = field(default_factory=list)

    def judge(self, item: Item, context: Any) -> str | None:  # noqa: ARG002 - as gates are called
        """Why it goes."""
        self.asked.append(item.key)
        return "a word that goes" if item.text.endswith(self.words or ("\0",)) else None

    def kept(self, item: Item, context: Any) -> None:
        """Nothing to remember."""


def make_plan(*stages: CountingStage, gates: Any = None, facts: Any = None, domain: str = "math") -> DomainPlan:
    """A domain of these stages."""
    return DomainPlan(domain, stages, gates or {}, facts or {})
