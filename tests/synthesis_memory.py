"""A view of items in memory, and answers of a teacher that always does as asked: to try stages and gates alone."""

from __future__ import annotations

import json
from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ultrafuser.synthesis.gates.base import Gate
from ultrafuser.synthesis.node import Answer, Item, ItemState, Node, item_key
from ultrafuser.synthesis.recipe import DomainConfig, StageName, SynthesisRecipe
from ultrafuser.synthesis.stages.base import Stage, UnreadableError

Teacher = Callable[[Node], str]


def recipe_for(*domains: str, **values: Any) -> SynthesisRecipe:
    """A recipe of shipped domains and one endpoint that is never asked."""
    endpoint = {"url": "http://127.0.0.1:1/v1", "model": "teacher"}
    values = {"name": "test", "endpoints": {"teacher": endpoint}, **values}
    return SynthesisRecipe(domains={name: DomainConfig() for name in domains}, **values)


def answer_of(text: str, finish_reason: str = "stop") -> Answer:
    return Answer(text, finish_reason, 1, 1, 0.0, "teacher")  # type: ignore[arg-type]


def an_item(
    text: str, *, key: str = "k", stage: str = "instructions", parent: str | None = None, **values: Any
) -> Item:
    return Item(
        **{"key": key, "node": "n", "parent": parent, "domain": "d", "stage": stage, "round": 0, "text": text} | values
    )


class MemoryView:
    """`View`, and what the store does with items."""

    def __init__(self) -> None:
        self.by_key: dict[str, Item] = {}
        self._order: dict[StageName, list[tuple[int, str]]] = defaultdict(list)
        self._children: dict[tuple[StageName, str | None], list[str]] = defaultdict(list)
        self.num_read = 0

    def put(self, item: Item) -> None:
        if item.key not in self.by_key:
            insort(self._order[item.stage], (item.round, item.key))
            self._children[item.stage, item.parent].append(item.key)
        self.by_key[item.key] = item

    def items(
        self, *stages: StageName, states: tuple[ItemState, ...] = ("kept",), parent: str | None = None
    ) -> Iterator[Item]:
        if parent is not None:
            keys = [key for stage in stages for key in self._children.get((stage, parent), ())]
            order = sorted((self.by_key[key].round, key) for key in keys)
        else:
            order = self._order[stages[0]] if len(stages) == 1 else sorted(k for s in stages for k in self._order[s])
        for _, key in order:
            self.num_read += 1
            if (item := self.by_key[key]).state in states:
                yield item

    def item(self, key: str) -> Item:
        return self.by_key[key]

    def count(self, *stages: StageName, states: tuple[ItemState, ...] = ("kept",)) -> int:
        return sum(self.by_key[key].state in states for stage in stages for _, key in self._order[stage])

    def count_by_parent(self, *stages: StageName, states: tuple[ItemState, ...] = ("kept",)) -> Mapping[str, int]:
        found: dict[str, int] = defaultdict(int)
        for stage in stages:
            for _, key in self._order[stage]:
                item = self.by_key[key]
                if item.state in states and item.parent is not None:
                    found[item.parent] += 1
        return found

    def lineage(self, item: Item) -> list[Item]:
        found = [item]
        while found[0].parent is not None:
            found.insert(0, self.by_key[found[0].parent])
        return found

    def without_child(self, *of: StageName, child: StageName) -> Iterator[Item]:
        for item in self.items(*of):
            children = self._children.get((child, item.key), ())
            if not any(self.by_key[key].state == "kept" for key in children):
                yield item


class MemoryBands:
    """`Bands`."""

    def __init__(self) -> None:
        self._items: dict[tuple[str, int], dict[str, Item]] = defaultdict(dict)

    def candidates(self, scope: str, bands: Sequence[int]) -> list[Item]:
        found = {key: item for band in bands for key, item in self._items.get((scope, band), {}).items()}
        return [found[key] for key in sorted(found)]

    def add(self, scope: str, item: Item, bands: Sequence[int]) -> None:
        for band in bands:
            assert 0 <= band < 2**63
            self._items[scope, band][item.key] = item


class MemoryContext:
    """`GateContext`."""

    def __init__(self, view: MemoryView | None = None, finish_reason: str = "stop") -> None:
        self.view = view or MemoryView()
        self.bands = MemoryBands()
        self._finish_reason = finish_reason

    def parent(self, item: Item) -> Item | None:
        return self.view.by_key.get(item.parent) if item.parent is not None else None

    def siblings(self, item: Item) -> list[Item]:
        every: tuple[ItemState, ...] = ("new", "kept", "dropped", "replaced")
        items = self.view.items(item.stage, states=every, parent=item.parent)  # type: ignore[arg-type]
        return [other for other in items if other.key != item.key]

    def finish_reason(self, item: Item) -> str:
        del item
        return self._finish_reason


def run_stage(
    stage: Stage, view: MemoryView, teacher: Teacher, gates: Sequence[Gate] = (), context: MemoryContext | None = None
) -> list[Node]:
    """All rounds of a stage, as the pipeline runs them; gives the nodes it asked."""
    context = context or MemoryContext(view)
    asked: list[Node] = []
    for round_ in range(stage.max_rounds):
        nodes = list(stage.plan(view, round_))
        if not nodes:
            break
        asked += nodes
        new: list[Item] = []
        for node in nodes:
            try:
                drafts = stage.read(node, answer_of(teacher(node)))
            except UnreadableError:
                continue
            for number, draft in enumerate(drafts):
                key, parent = item_key(node.key, number), draft.parent or node.parent
                place = (key, node.key, parent, node.domain, node.stage, round_)
                new.append(Item(*place, text=draft.text, detail=draft.detail))
        for item in new:
            view.put(item)
        for item in sorted(new, key=lambda one: one.key):
            verdict = next(((gate.name, why) for gate in gates if (why := gate.judge(item, context)) is not None), None)
            if verdict is not None:
                view.put(replace(item, state="dropped", gate=verdict[0], reason=verdict[1]))
                continue
            kept = replace(item, state="kept")
            view.put(kept)
            for gate in gates:
                gate.kept(kept, context)
            if (original := stage.replaced(kept)) is not None:
                view.put(replace(view.item(original), state="replaced"))
    return asked


def obedient(node: Node) -> str:
    """As many items as were asked for, each unlike any other, in the form that was asked for."""
    count = node.detail.get("count", 1)
    names = [f"{node.stage} {node.key[:12]} {number}" for number in range(count)]
    if node.request.answer == "topics":
        return json.dumps(
            {"topics": [{"name": name, "relevance": "It matters.", "use_case": "A case."} for name in names]}
        )
    if node.request.answer == "instructions":
        return json.dumps({"instructions": names})
    if node.request.answer == "instruction":
        return json.dumps({"instruction": names[0]})
    return f"An answer to {node.key}."
