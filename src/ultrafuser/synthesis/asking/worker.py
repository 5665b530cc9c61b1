"""The worker: claims waiting nodes, asks endpoints, and writes what became of them.

A request keeps its place among those under way until its transaction is on the disk, so a kill repeats at most as many
calls as were under way.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ultrafuser.errors import SynthesisError
from ultrafuser.synthesis.asking.batch import BatchDesk
from ultrafuser.synthesis.asking.budget import Budget, Share, most
from ultrafuser.synthesis.asking.endpoints.client import Client
from ultrafuser.synthesis.asking.endpoints.pool import Pool, Ticket
from ultrafuser.synthesis.asking.endpoints.refusal import Refusal
from ultrafuser.synthesis.asking.endpoints.usage import likely_prompt_tokens
from ultrafuser.synthesis.asking.outcome import Outcome, Read, finish, outcome_of_refusal
from ultrafuser.synthesis.asking.writer import Listener, Recorded, Run, Writer
from ultrafuser.synthesis.node import Answer
from ultrafuser.synthesis.queue import Claimed, Queue
from ultrafuser.synthesis.recipe import SynthesisRecipe

__all__ = ["Listener", "Read", "Recorded", "Run", "Worker"]

LOOK_AGAIN_S = 2.0  # at the queue, where others may have put something or let go of it


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass
class _Line:
    """Nodes of one endpoint that are claimed and wait for a place."""

    ready: deque[Claimed] = field(default_factory=deque)
    look_at: float = 0.0  # not before this time does the queue have more (seconds since the epoch)


class Worker:
    """Asks for what waits in a queue.

    Args:
        recipe: Whose endpoints are asked, within its limits.
        queue: Of nodes to ask. It is called through `run` alone, one call after another.
        run: Runs a function on the database's thread.
        read: Reads the items of an answer; raises UnreadableError.
        listener: Called in the event loop after every transaction; it must not block.
        backoff_s: The wait before a second attempt; it doubles with every further one, up to a minute.
        tell: Told in a line what files of batch results held; default: stderr.

    Raises:
        ConfigError: An endpoint's address or key cannot be.
    """

    def __init__(
        self,
        recipe: SynthesisRecipe,
        queue: Queue,
        run: Run,
        read: Read,
        listener: Listener | None = None,
        *,
        backoff_s: float = 1.0,
        tell: Callable[[str], None] = _to_stderr,
    ) -> None:
        self.recipe, self.queue, self.read, self.backoff_s = recipe, queue, read, backoff_s
        self._run = run
        live = {name: config for name, config in recipe.endpoints.items() if config.batch == "no"}
        self.pool = Pool.open(live, recipe.limits.give_up_after_s)
        self.budget = Budget(recipe.limits)
        self.writer = Writer(queue, run, listener, self.budget)
        self.desks = [
            BatchDesk(
                Client(name, config, config.urls[0]),
                recipe,
                queue,
                run,
                read,
                self.writer,
                self.budget,
                changed=lambda: self._changed.set(),
                tell=tell,
            )
            for name, config in recipe.endpoints.items()
            if config.batch != "no"
        ]
        self._lines = {name: _Line() for name in live}
        self._tasks: dict[asyncio.Task[None], str] = {}  # and the keys of their nodes
        self._unasked: list[str] = []
        self._changed = asyncio.Event()
        self._is_closed = self._is_stopped = False
        self._has_looked, self._num_strange = False, 0
        self._error: BaseException | None = None

    async def work(self) -> None:
        """Ask until nothing is waiting or under way after `close`, or until `stop`; call it once.

        Whatever ends it, requests under way are waited for and written first, and nodes that were claimed but not
        asked are released.

        Raises:
            SynthesisError: A limit of the recipe is reached, a key or an address is wrong, or an endpoint gave no
                answer for too long; one line.
        """
        self.budget.set_spent(await self._run(self.queue.spent))
        async with self.pool:
            for desk in self.desks:
                desk.prepare()
            writing = asyncio.create_task(self.writer.write_all(self._written))
            batching = [asyncio.create_task(desk.work()) for desk in self.desks]
            for task in batching:
                task.add_done_callback(lambda _: self._changed.set())
            try:
                while not self._ends():
                    self._changed.clear()
                    await self._fill()
                    wait_s = self._send()
                    if await self._is_done():
                        break
                    await self._pause(wait_s)
            except asyncio.CancelledError:
                self._give_up()
                raise
            except Exception as error:
                self._error = self._error or error
            finally:
                await self._drain(writing, batching)
        if self._error is not None:
            raise self._error

    def wake(self) -> None:
        """New nodes are waiting. From the event loop's thread, as all of these."""
        for line in self._lines.values():
            line.look_at = 0.0
        for desk in self.desks:
            desk.wake()
        self._changed.set()

    def close(self) -> None:
        """Nothing more will come: `work` returns when nothing is waiting or under way."""
        self._is_closed = True
        self.wake()

    def stop(self) -> None:
        """Ask nothing more, and return when what is under way is written. The second call gives that up, too."""
        if self._is_stopped:
            self._give_up()
        self._is_stopped = True
        self._changed.set()

    @property
    def num_under_way(self) -> int:
        """Requests that were sent and are not on the disk yet."""
        return sum(endpoint.num_under_way for endpoint in self.pool.endpoints.values())

    def _ends(self) -> bool:
        """Whether nothing more is to be asked; for a reason that is kept, if there is one."""
        if self._error is None:
            self._error = self.writer.error
        if self._error is None and (reason := self.pool.ends_run()) is not None:
            self._error = SynthesisError(reason)
        for desk in self.desks:
            self._error = self._error or desk.error
        return self._is_stopped or self._error is not None

    async def _fill(self) -> None:
        """Claim as many nodes as could be sent soon: one round's worth for each endpoint."""
        now = time.time()
        wanted = {}
        for name, line in self._lines.items():
            limit = self.pool.endpoints[name].limit
            if line.look_at <= now and len(line.ready) <= limit // 2:
                wanted[name] = limit - len(line.ready)
        self._has_looked = bool(wanted)
        if not wanted:
            return
        for claimed in await self._run(lambda: self.queue.claim(wanted, now=now)):
            name = claimed.node.request.endpoint
            self._lines[name].ready.append(claimed)
            wanted[name] -= 1
        for name, missing in wanted.items():
            if missing > 0:
                self._lines[name].look_at = now + LOOK_AGAIN_S

    def _send(self) -> float:
        """Send what may be sent now; gives how long until more may be, if nothing happens before."""
        wait_s = float("inf")
        for name, line in self._lines.items():
            while line.ready:
                request = line.ready[0].node.request
                share = most(request, self.recipe.endpoints[name])
                if not self.budget.reserve(share):
                    self._error = self._error or self._end_of_budget(share)
                    break
                tokens = likely_prompt_tokens(request) + request.max_tokens
                ticket = self.pool.begin(name, tokens, time.monotonic())
                if not isinstance(ticket, Ticket):
                    self.budget.settle(share, None)
                    wait_s = min(wait_s, ticket)
                    break
                self._start(line.ready.popleft(), ticket, share)
        return wait_s

    def _end_of_budget(self, share: Share) -> SynthesisError | None:
        """Why a share will not be left later either; None: what is under way may give some back."""
        if self._tasks or self.writer.num_waiting:
            return None
        if (stalled := next((desk.stalled for desk in self.desks if desk.stalled is not None), None)) is not None:
            return stalled
        return None if self.budget.num_reserved else SynthesisError(self.budget.reached(share))

    def _start(self, claimed: Claimed, ticket: Ticket, share: Share) -> None:
        task = asyncio.create_task(self._ask(claimed, ticket, share))
        self._tasks[task] = claimed.node.key
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        key = self._tasks.pop(task)
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or error is not None:
            self._unasked.append(key)
        self._error = self._error or error
        self._changed.set()

    async def _ask(self, claimed: Claimed, ticket: Ticket, share: Share) -> None:
        try:
            result = await ticket.address.client.ask(claimed.node.request)
        except BaseException:
            self.pool.abandon(ticket)
            self.budget.settle(share, None, may_cost=True)
            raise
        now = time.monotonic()

        def settle() -> None:
            self.pool.end(ticket, result, now)
            may_cost = isinstance(result, Refusal) and result.may_cost
            self.budget.settle(share, result if isinstance(result, Answer) else None, may_cost=may_cost)

        self.writer.put(self._outcome(claimed, ticket, result), settle)

    def _outcome(self, claimed: Claimed, ticket: Ticket, result: Answer | Refusal) -> Outcome:
        if isinstance(result, Answer):
            outcome, error = finish(claimed.node, result, self.read)
            self._error = self._error or error
            return outcome
        return outcome_of_refusal(
            claimed,
            result,
            max_attempts=self.recipe.limits.max_attempts,
            backoff_s=self.backoff_s,
            has_answered=ticket.endpoint.has_answered,
        )

    def _written(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            line = self._lines.get(outcome.node.request.endpoint)
            if outcome.postponed is not None and line is not None:
                line.look_at = min(line.look_at, outcome.postponed.until)
        self._changed.set()

    async def _is_done(self) -> bool:
        """Whether nothing is left to ask, and nothing will come."""
        if self._tasks or self.writer.num_waiting or any(line.ready for line in self._lines.values()):
            self._num_strange = 0
            return False
        for desk in self.desks:
            if desk.stalled is not None:
                raise desk.stalled
            if not desk.is_done:
                return False
        due = await self._run(self.queue.next_due)
        if due is None:
            return self._is_closed
        # Due, and not among what could be claimed: once is chance, where others work at the same database.
        if self._has_looked:
            self._num_strange = self._num_strange + 1 if due <= time.time() - LOOK_AGAIN_S else 0
        if self._num_strange > 2:
            names = ", ".join(self.recipe.endpoints)
            raise SynthesisError(
                f"requests wait for an endpoint that the recipe does not have; it has {names}. Give that one back its "
                "name, or begin anew from a stage with --from STAGE"
            )
        return False

    async def _pause(self, wait_s: float) -> None:
        now = time.time()
        due = [line.look_at - now for line in self._lines.values() if line.look_at > now]
        try:
            async with asyncio.timeout(min(wait_s, LOOK_AGAIN_S, *due)):
                await self._changed.wait()
        except TimeoutError:
            return

    def _give_up(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _drain(self, writing: asyncio.Task[None], batching: list[asyncio.Task[None]]) -> None:
        """Wait for what is under way, write it, and let go of the rest."""
        for task in batching:
            task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.gather(*batching, return_exceptions=True)  # what went wrong there is in desk.error
        self.writer.close()
        await writing
        try:
            await self.writer.flush()
        except Exception as error:
            self._error = self._error or error
        unasked = self._unasked + [claimed.node.key for line in self._lines.values() for claimed in line.ready]
        if unasked and not self.writer.num_waiting:
            await self._run(lambda: self.queue.release(unasked))
