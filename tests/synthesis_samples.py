"""A small finished synthesis in a real store: topics, instructions, rewritten ones, answers, follow-ups, drops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import update

from ultrafuser.synthesis.node import Answer, ChatMessage, ItemState, Node, Request, item_key
from ultrafuser.synthesis.queue import Finished
from ultrafuser.synthesis.recipe import SynthesisRecipe
from ultrafuser.synthesis.stages.base import ItemDraft
from ultrafuser.synthesis.storage.schema import item
from ultrafuser.synthesis.storage.store import Store

MODELS = {"writer": "big-model-2026", "helper": "small-model"}


def sample_recipe(folder: Path, *domains: str, **more: Any) -> SynthesisRecipe:
    """Two endpoints, and domains that come with the package; nothing is ever asked."""
    tree: dict[str, Any] = {
        "name": "sample",
        "folder": folder,
        "endpoints": {
            "writer": {
                "url": "http://user:SECRETPASS@10.9.8.7:1/v1",
                "model": "asked-for",
                "key_variable": "SECRET_VARIABLE",
                "licence": "apache-2.0",
                "extra_body": {"api_key": "SECRETKEY"},
            },
            "helper": {"url": "http://10.9.8.7:2/v1", "model": "small-model"},
        },
        "domains": {name: {} for name in domains or ("text", "code")},
        "export": {"name": "A sample", "licence": "cc-by-4.0", "validation_fraction": 0.2},
    }
    return SynthesisRecipe.model_validate(tree | more)


class Grower:
    """Puts items into a store as the pipeline would: each from an answer of a node of its own."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._number = 0
        self._waiting: list[tuple[Finished, ItemState, tuple[str, str] | None]] = []

    def add(
        self,
        domain: str,
        stage: str,
        text: str,
        parent: str | None = None,
        *,
        state: ItemState = "kept",
        verdict: tuple[str, str] | None = None,
        endpoint: str = "writer",
        **detail: Any,
    ) -> str:
        """One item; gives its key. It is in the store after `flush`."""
        self._number += 1
        asked = (ChatMessage(role="user", content=f"{stage} {self._number}"),)
        request = Request(endpoint=endpoint, model=endpoint, messages=asked)
        node = Node(domain, stage, 0, parent, self._number, request)
        answer = Answer(text, "stop", 10, 5, 0.001, MODELS[endpoint])
        self._waiting.append((Finished(node, answer, (ItemDraft(text, detail),)), state, verdict))
        return item_key(node.key, 0)

    def drop(self, domain: str, stage: str, text: str, parent: str | None, gate: str, reason: str) -> str:
        """An item that a gate has dropped."""
        return self.add(domain, stage, text, parent, state="dropped", verdict=(gate, reason))

    def flush(self) -> None:
        """Write all of them."""
        for start in range(0, len(self._waiting), 300):
            part = self._waiting[start : start + 300]
            self.store.plan([finished.node for finished, _, _ in part])
            self.store.record([finished for finished, _, _ in part])
            with self.store.database.transaction():
                for finished, state, verdict in part:
                    gate, reason = verdict or (None, None)
                    values = {"state": state, "gate": gate, "reason": reason}
                    key = item_key(finished.node.key, 0)
                    self.store.database.write(update(item).where(item.c.key == key).values(values))
        self._waiting.clear()


def grow(store: Store, domain: str, *, metas: int = 2, subs: int = 4, instructions: int = 3) -> None:
    """A finished domain; the first of every three instructions of a topic was made more complex."""
    grower = Grower(store)
    for m in range(metas):
        meta = grower.add(domain, "meta_topics", f"{domain} area {m}", relevance="It | matters", use_case="daily")
        for s in range(subs):
            sub = grower.add(domain, "sub_topics", f"{domain} topic {m}.{s}", meta, relevance="so", use_case="such")
            for i in range(instructions):
                text = f"Explain {domain} point {m}.{s}.{i} to a colleague who asks about {'xyz'[i % 3] * 3}."
                stage = ("instructions", "strong", "weak")[i % 3]
                if i == 0:
                    seed = grower.add(domain, stage, text, sub, state="replaced")
                    seed = grower.add(domain, "complicated", f"{text} Name limits.", seed, endpoint="helper")
                else:
                    seed = grower.add(domain, stage, text, sub)
                answer = grower.add(domain, "responses", f"Answer to {m}.{s}.{i}: {'word ' * (5 + i)}.", seed)
                if i == 1:
                    further = grower.add(domain, "follow_ups", f"And why {m}.{s}.{i}?", answer)
                    grower.add(domain, "follow_up_responses", "Because of this.", further)
            grower.drop(domain, "instructions", "Same | again", sub, "duplicates", "the same")
        grower.drop(domain, "sub_topics", "As an AI", meta, "refusals", "as an ai")
    grower.flush()
