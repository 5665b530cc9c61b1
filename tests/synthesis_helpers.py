"""Recipes, nodes and runs of a worker on a real store, for the tests of asking."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ultrafuser.synthesis.asking.worker import Worker
from ultrafuser.synthesis.node import Answer, ChatMessage, Node, Request
from ultrafuser.synthesis.recipe import EndpointConfig, LimitsConfig, SynthesisRecipe
from ultrafuser.synthesis.stages.base import ItemDraft
from ultrafuser.synthesis.storage.store import Store

T = TypeVar("T")


def make_recipe(folder: Path, url: str = "http://127.0.0.1:9/v1", *, limits: Any = None, **endpoint: Any) -> Any:
    """A recipe with one endpoint, `writer`."""
    config = {"url": url, "model": "scripted", "concurrency": 8, "timeout_s": 10.0} | endpoint
    return SynthesisRecipe(
        name="test",
        folder=folder,
        endpoints={"writer": EndpointConfig.model_validate(config)},
        domains={"text": {}},
        limits=LimitsConfig.model_validate(limits or {}),
    )


def make_request(number: int = 0, *, endpoint: str = "writer", **fields: Any) -> Request:
    """One of many different requests."""
    if "prompt" not in fields:
        fields["messages"] = (ChatMessage(role="user", content=f"Tell me about number {number}."),)
    return Request(endpoint=endpoint, model=fields.pop("model", "scripted"), max_tokens=200, seed=number, **fields)


def make_node(number: int = 0, **fields: Any) -> Node:
    """A node with such a request."""
    return Node("text", "responses", 0, None, number, make_request(number, **fields))


def read_whole(_node: Node, answer: Answer) -> list[ItemDraft]:
    """The answer is the item."""
    return [ItemDraft(answer.text)]


class OneThread:
    """Runs functions on one thread, as the pipeline does."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(1)

    async def __call__(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.executor, function)


def work(
    recipe: SynthesisRecipe,
    nodes: Iterable[Node] = (),
    *,
    read: Any = read_whole,
    during: Callable[[Worker], Any] | None = None,
    backoff_s: float = 0.01,
    prepare: Callable[[Worker], None] | None = None,
) -> Worker:
    """Plan nodes and let a worker ask until nothing waits; `during` runs beside it, `prepare` before.

    Raises what `Worker.work` raises, with the store closed.
    """
    with Store.open(recipe) as store:
        planned = list(nodes)
        for start in range(0, len(planned), 200):
            store.plan(planned[start : start + 200])
        run = OneThread()

        async def go() -> Worker:
            worker = Worker(recipe, store, run, read, backoff_s=backoff_s)
            for desk in worker.desks:
                desk.settle_s, desk.first_poll_s = 0.01, 0.02
            if prepare is not None:
                prepare(worker)
            beside = asyncio.create_task(during(worker)) if during is not None else None
            if during is None:
                worker.close()
            try:
                await worker.work()
            finally:
                if beside is not None:
                    beside.cancel()
            return worker

        try:
            return asyncio.run(go())
        finally:
            run.executor.shutdown()


def states(recipe: SynthesisRecipe) -> dict[str, int]:
    """How many nodes are in each state."""
    with Store.open(recipe, read_only=True) as store:
        counts: dict[str, int] = {}
        for one in store.progress():
            for state, number in one.nodes.items():
                counts[state] = counts.get(state, 0) + number
        return counts


def spent(recipe: SynthesisRecipe) -> Any:
    """What the store says was spent."""
    with Store.open(recipe, read_only=True) as store:
        return store.spent()
