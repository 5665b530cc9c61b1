"""The store behaves as a dictionary would, whatever is done in whatever order and however often it is killed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from synthesis_stores import make_answer, make_node, make_recipe
from ultrafuser.synthesis.node import Node
from ultrafuser.synthesis.queue import Failed, Finished, Postponed
from ultrafuser.synthesis.stages.base import ItemDraft
from ultrafuser.synthesis.storage.rounds import STAGE_ORDER
from ultrafuser.synthesis.storage.store import Store

STAGES = ("meta_topics", "sub_topics")
POOL = [make_node(slot, stage=stage, endpoint=end) for slot in range(4) for stage in STAGES for end in ("one", "two")]
BY_KEY = {node.key: node for node in POOL}
some = st.lists(st.sampled_from(POOL), max_size=6)
texts = st.text(st.characters(exclude_categories=()), max_size=5)  # halves of surrogate pairs, NUL and all


class StoreMachine(RuleBasedStateMachine):
    """Compares the store with `self.nodes`: key to state, attempts, not_before, planned, and number of items."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.recipe = make_recipe(Path(self.folder.name))
        self.store = Store.open(self.recipe)
        self.nodes: dict[str, dict[str, Any]] = {}
        self.num_answers = 0
        self.now = 1000.0

    def of_state(self, state: str) -> list[str]:
        return sorted(key for key, node in self.nodes.items() if node["state"] == state and node["planned"])

    @rule(nodes=some)
    def plan(self, nodes: list[Node]) -> None:
        planned = self.store.plan(nodes)
        num_new = 0
        known = set()
        for node in {node.key: node for node in nodes}.values():
            one = self.nodes.get(node.key)
            if one is None:
                self.nodes[node.key] = {"state": "waiting", "attempts": 0, "due": 0.0, "planned": True, "items": 0}
                num_new += 1
            elif not one["planned"] and one["state"] in ("answered", "unreadable"):
                known.add(node.key)
            elif not one["planned"]:
                num_new += one["state"] in ("waiting", "failed")
                if one["state"] != "claimed":
                    one.update(state="waiting", attempts=0, due=0.0)
                one["planned"] = True
        assert planned.num_new == num_new
        assert {node.key for node, _ in planned.known} == known
        for node, answer in planned.known:
            assert node == BY_KEY[node.key]
            self.store.read_again([Finished(node, answer, (ItemDraft("again"),))])
            self.nodes[node.key].update(state="answered", planned=True, items=1)

    @rule(one=st.integers(0, 4), two=st.integers(0, 4))
    def claim(self, one: int, two: int) -> None:
        claimed = self.store.claim({"one": one, "two": two}, now=self.now)
        for endpoint, number in (("one", one), ("two", two)):
            mine = [key for key in self.of_state("waiting") if BY_KEY[key].request.endpoint == endpoint]
            due = [key for key in mine if self.nodes[key]["due"] <= self.now][:number]
            assert [c.node.key for c in claimed if c.node.request.endpoint == endpoint] == due
        for one_ in claimed:
            assert one_.node == BY_KEY[one_.node.key]
            assert one_.num_attempts == self.nodes[one_.node.key]["attempts"]
            self.nodes[one_.node.key]["state"] = "claimed"

    @rule(nodes=some)
    def take(self, nodes: list[Node]) -> None:
        taken = {claimed.node.key for claimed in self.store.take([node.key for node in nodes])}
        assert taken == {node.key for node in nodes} & set(self.of_state("waiting"))
        for key in taken:
            self.nodes[key]["state"] = "claimed"

    @precondition(lambda self: self.claimed())
    @rule(data=st.data(), text=texts, is_readable=st.booleans(), num_items=st.integers(0, 3))
    def answer(self, data: Any, text: str, is_readable: bool, num_items: int) -> None:
        key = data.draw(st.sampled_from(self.claimed()))
        items = tuple(ItemDraft(text, {"word": text}) for _ in range(num_items)) if is_readable else ()
        unreadable = None if is_readable else f"cannot: {text}"
        self.store.record([Finished(BY_KEY[key], make_answer(text), items, unreadable)])
        one = self.nodes[key]
        one.update(state="answered" if is_readable else "unreadable", items=len(items) if one["planned"] else 0)
        self.num_answers += 1

    @precondition(lambda self: self.claimed())
    @rule(data=st.data(), wait=st.integers(0, 100), counts=st.booleans())
    def postpone(self, data: Any, wait: int, counts: bool) -> None:
        key = data.draw(st.sampled_from(self.claimed()))
        self.store.record(postponed=[Postponed(key, self.now + wait, "busy", counts)])
        one = self.nodes[key]
        one.update(state="waiting", due=self.now + wait, attempts=one["attempts"] + counts)

    @precondition(lambda self: self.claimed())
    @rule(data=st.data())
    def fail(self, data: Any) -> None:
        key = data.draw(st.sampled_from(self.claimed()))
        self.store.record(failed=[Failed(key, "no")])
        self.nodes[key]["state"] = "failed"

    @precondition(lambda self: self.claimed())
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        key = data.draw(st.sampled_from(self.claimed()))
        self.store.release([key])
        self.nodes[key]["state"] = "waiting"

    @rule(seconds=st.integers(0, 150))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(stage=st.sampled_from(STAGES))
    def forget(self, stage: Any) -> None:
        self.store.rounds.forget("math", stage)
        for key, one in self.nodes.items():
            if STAGE_ORDER.index(BY_KEY[key].stage) >= STAGE_ORDER.index(stage):
                one.update(planned=False, items=0)

    @rule()
    def kill_and_open(self) -> None:
        self.store.close()  # which does not release anything, as a kill does not
        self.store = Store.open(self.recipe)
        for one in self.nodes.values():
            if one["state"] == "claimed":
                one["state"] = "waiting"

    def claimed(self) -> list[str]:
        return sorted(key for key, node in self.nodes.items() if node["state"] == "claimed")

    @invariant()
    def counts_agree(self) -> None:
        counts: dict[str, dict[str, int]] = {}
        items: dict[str, int] = {}
        for key, one in self.nodes.items():
            if one["planned"]:
                states = counts.setdefault(BY_KEY[key].stage, {})
                states[one["state"]] = states.get(one["state"], 0) + 1
                items[BY_KEY[key].stage] = items.get(BY_KEY[key].stage, 0) + one["items"]
        progress = self.store.progress()
        assert {count.stage: count.nodes for count in progress if count.nodes} == counts
        assert {count.stage: count.items.get("new", 0) for count in progress if count.nodes} == items
        assert self.store.spent().num_answers == self.num_answers
        assert self.store.spent().cost == self.num_answers * 0.25

    @invariant()
    def next_due_agrees(self) -> None:
        due = [self.nodes[key]["due"] for key in self.of_state("waiting")]
        assert self.store.next_due() == (min(due) if due else None)
        assert [node.key for node in self.store.waiting("one")] == [
            key for key in self.of_state("waiting") if BY_KEY[key].request.endpoint == "one"
        ]
        assert self.store.known([node.key for node in POOL]) == set(self.nodes)

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


StoreMachine.TestCase.settings = settings(max_examples=8, stateful_step_count=30, deadline=None)
TestStore = StoreMachine.TestCase
