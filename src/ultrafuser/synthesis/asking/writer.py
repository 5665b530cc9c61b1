"""Writes outcomes in groups, so that one write to the disk serves all that came while the last one was made."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from ultrafuser.synthesis.asking.budget import Budget
from ultrafuser.synthesis.asking.outcome import Outcome
from ultrafuser.synthesis.node import Node
from ultrafuser.synthesis.queue import Failed, Finished, Postponed, Queue, Spent

GROUP_S = 0.01  # between the beginnings of two transactions, at least
MAX_GROUP = 500  # outcomes of one transaction

T = TypeVar("T")


class Run(Protocol):
    """Runs a function on the one thread that talks to the database."""

    async def __call__(self, function: Callable[[], T]) -> T:
        """What the function gives, or raises."""
        ...


@dataclass(frozen=True, slots=True)
class Recorded:
    """What one transaction wrote; `nodes` holds every node it is about, by key."""

    nodes: Mapping[str, Node]
    finished: tuple[Finished, ...] = ()
    postponed: tuple[Postponed, ...] = ()
    failed: tuple[Failed, ...] = ()


Listener = Callable[[Recorded], None]
_Entry = tuple[Outcome, Callable[[], None]]


class Writer:
    """The way of all outcomes into the queue.

    Attributes:
        error: Why it writes no more; what could not be written is kept for `close`.
    """

    def __init__(self, queue: Queue, run: Run, listener: Listener | None, budget: Budget) -> None:
        self._queue, self._run, self._listener, self._budget = queue, run, listener, budget
        self._entries: list[_Entry] = []
        self._num_writing = 0
        self._came = asyncio.Event()
        self._is_closed = False
        self.error: Exception | None = None

    @property
    def num_waiting(self) -> int:
        """Outcomes that are not on the disk yet."""
        return len(self._entries) + self._num_writing

    def put(self, outcome: Outcome, written: Callable[[], None]) -> None:
        """Write it soon; `written` is called when it is on the disk."""
        self._entries.append((outcome, written))
        self._came.set()

    async def write_all(self, after: Callable[[Sequence[Outcome]], None]) -> None:
        """Write what comes, until `close` or an error; `after` is called for every group."""
        began = 0.0
        while not self._is_closed and self.error is None:
            await self._came.wait()
            if (wait_s := began + GROUP_S - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            began = time.monotonic()
            try:
                after(await self._write_group())
            except Exception as error:
                self.error = error
                after(())

    def close(self) -> None:
        """Let `write_all` end."""
        self._is_closed = True
        self._came.set()

    async def flush(self) -> None:
        """Write what is left, which is tried again where it could not be written before; after `write_all`.

        Raises:
            SynthesisError: It cannot.
        """
        while self._entries:
            await self._write_group()

    async def write(self, outcomes: Sequence[Outcome], written: Callable[[Outcome], None]) -> None:
        """Write these, and return when they are on the disk."""
        left, done = len(outcomes), asyncio.Event()

        def one(outcome: Outcome) -> None:
            nonlocal left
            written(outcome)
            left -= 1
            if not left:
                done.set()

        for outcome in outcomes:
            self.put(outcome, partial(one, outcome))
        if outcomes:
            await done.wait()

    async def _write_group(self) -> list[Outcome]:
        group = self._entries[:MAX_GROUP]
        del self._entries[:MAX_GROUP]
        if not self._entries:
            self._came.clear()
        outcomes = [outcome for outcome, _ in group]
        finished = tuple(o.finished for o in outcomes if o.finished is not None)
        postponed = tuple(o.postponed for o in outcomes if o.postponed is not None)
        failed = tuple(o.failed for o in outcomes if o.failed is not None)

        def record() -> Spent | None:
            self._queue.record(finished, postponed, failed)
            return self._queue.spent() if self._budget.is_limited else None

        self._num_writing = len(group)
        try:
            spent = await self._run(record) if group else None
        except BaseException:
            self._entries[:0] = group
            raise
        finally:
            self._num_writing = 0
        for _, written in group:
            written()
        if spent is not None:  # with what other processes spent
            self._budget.set_spent(spent)
        if group and self._listener is not None:
            self._listener(Recorded({o.node.key: o.node for o in outcomes}, finished, postponed, failed))
        return outcomes
