"""One domain's course: its stages one after another, each in rounds of planning, asking and judging.

Between a round's parts everything of the domain stands still, so plans and verdicts depend on keys alone. The database
is given a little to do at a time, so that answers of other domains are written in between.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from ultrafuser.synthesis.basis import remember_basis
from ultrafuser.synthesis.gates.base import Gate
from ultrafuser.synthesis.node import Answer, Node
from ultrafuser.synthesis.queue import Finished
from ultrafuser.synthesis.recipe import StageName
from ultrafuser.synthesis.stages.base import Stage, UnreadableError
from ultrafuser.synthesis.storage.nodes import CHUNK
from ultrafuser.synthesis.storage.rounds import Round
from ultrafuser.synthesis.storage.store import Store

T = TypeVar("T")
POLL_S = 1.0  # how soon work by other processes is noticed
_PLAN_S = 0.25  # how long the database's thread plans without a break


@dataclass(frozen=True)
class DomainPlan:
    """All that the pipeline needs of a domain.

    Attributes:
        gates: Of each stage.
        facts: What each stage is planned with (`basis`).
    """

    name: str
    stages: Sequence[Stage]
    gates: Mapping[StageName, Sequence[Gate]]
    facts: Mapping[StageName, Mapping[str, Any]]


class Host(Protocol):
    """Whoever runs several courses."""

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function on the database's thread."""
        ...

    def wake(self) -> None:
        """Nodes were planned."""
        ...

    def changes(self) -> asyncio.Event:
        """Set when something is written after this call."""
        ...

    async def show(self) -> None:
        """A round was planned or judged."""
        ...


class Course:
    """The course of one domain.

    Args:
        review_after: Stages after which it waits for a person.
    """

    def __init__(self, domain: DomainPlan, store: Store, host: Host, review_after: Sequence[StageName]) -> None:
        self._domain = domain
        self._name = domain.name
        self._store = store
        self._host = host
        self._review_after = review_after

    async def run(self) -> StageName | None:
        """Go on from where the database is; gives the stage whose sample a person is to look at, None at the end."""
        for stage in self._domain.stages:
            await self._run_stage(stage)
            if stage.name in self._review_after and not await self._is_reviewed(stage.name):
                return stage.name
        return None

    async def _run_stage(self, stage: Stage) -> None:
        known = {
            one.number: one for one in await self._host.call(lambda: self._store.rounds.of(self._name, stage.name))
        }
        for number in range(stage.max_rounds):
            one = known.get(number) or await self._plan(stage, number)
            if one.num_nodes == 0:
                return
            if not one.is_judged:
                await self._wait_for_answers(stage.name, number)
                await self._judge(stage, number)

    async def _plan(self, stage: Stage, number: int) -> Round:
        if number == 0:
            facts = self._domain.facts.get(stage.name, {})
            await self._host.call(lambda: remember_basis(self._store.database, self._name, stage.name, facts))
        nodes = stage.plan(self._store.view(self._name), number)
        num_nodes = 0
        while num_planned := await self._host.call(lambda: self._plan_some(stage, nodes)):
            num_nodes += num_planned
            self._host.wake()
        await self._host.call(lambda: self._store.rounds.add(self._name, stage.name, number, num_nodes))
        await self._host.show()
        return Round(number, num_nodes, is_judged=num_nodes == 0)

    def _plan_some(self, stage: Stage, nodes: Iterator[Node]) -> int:
        some = list(_for_a_while(islice(nodes, CHUNK), _PLAN_S))
        if some and (known := self._store.plan(some).known):
            self._store.read_again([finish(stage, node, answer) for node, answer in known])
        return len(some)

    async def _wait_for_answers(self, stage: StageName, number: int) -> None:
        while True:
            changes = self._host.changes()
            if not await self._host.call(lambda: self._store.rounds.is_open(self._name, stage, number)):
                return
            try:
                async with asyncio.timeout(POLL_S):
                    await changes.wait()
            except TimeoutError:
                continue

    async def _judge(self, stage: Stage, number: int) -> None:
        gates = self._domain.gates.get(stage.name, ())

        def judge_some() -> int:
            return self._store.rounds.judge(self._name, stage.name, number, gates, stage.replaced)

        while await self._host.call(judge_some):
            continue
        await self._host.show()

    async def _is_reviewed(self, stage: StageName) -> bool:
        return await self._host.call(lambda: self._store.verdicts.is_finished(self._name, stage))


def finish(stage: Stage, node: Node, answer: Answer) -> Finished:
    """Read an answer that is remembered."""
    try:
        return Finished(node, answer, tuple(stage.read(node, answer)))
    except UnreadableError as error:
        return Finished(node, answer, unreadable=str(error))


def _for_a_while(values: Iterator[T], seconds: float) -> Iterator[T]:
    end = time.monotonic() + seconds
    for value in values:
        yield value
        if time.monotonic() > end:
            return
