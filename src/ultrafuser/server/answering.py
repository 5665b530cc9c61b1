"""One client's request at work in the engine: submitted whole or not at all, with deadlines, and cancelled whole."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

from ultrafuser.engine.requests import GenerationRequest, Listener, RequestHandle, StreamEvent
from ultrafuser.engine.thread import EngineThread
from ultrafuser.errors import UltrafuserError
from ultrafuser.server.api_error import ApiError, busy, engine_failed, from_ours
from ultrafuser.server.facts import RequestFacts
from ultrafuser.server.metrics import Metrics
from ultrafuser.server.settings import Deadlines


class Answering:
    """The engine's work on one request of a client; submits on construction.

    Args:
        engine: The engine.
        requests: One per prompt.
        deadlines: How long to wait.
        facts: Gets what the log wants to know.
        metrics: Get times between tokens, and gate weights.

    Raises:
        ApiError: The engine refuses one of them.
    """

    def __init__(
        self,
        engine: EngineThread,
        requests: Sequence[GenerationRequest],
        deadlines: Deadlines,
        facts: RequestFacts,
        metrics: Metrics,
    ) -> None:
        self.engine, self.deadlines, self.facts, self.metrics = engine, deadlines, facts, metrics
        self.num_choices = sum(request.params.n for request in requests)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, StreamEvent]] = asyncio.Queue()
        self._handles: list[RequestHandle] = []
        self._begin = time.monotonic()
        facts.prompt_tokens = sum(max(len(row) for row in request.prompts) for request in requests)
        if engine.failure is not None:
            raise ApiError(503, "the engine has stopped: the server must be started again", code="engine_dead")
        first = 0
        try:
            for request in requests:
                self._handles.append(engine.submit(request, self._listener(first)))
                first += request.params.n
        except UltrafuserError as error:
            self.cancel()
            raise from_ours(error) from error

    def cancel(self) -> None:
        """Free what the engine holds for this request. Harmless when it is over."""
        for handle in self._handles:
            handle.cancel()

    async def events(self) -> AsyncIterator[tuple[int, StreamEvent]]:
        """Each event with the number of its choice, counted over all prompts, until every choice is finished.

        Raises:
            ApiError: The engine failed, or a deadline passed; then everything is cancelled.
        """
        waiting, started = set(range(self.num_choices)), set[int]()
        last: dict[int, float] = {}
        try:
            while waiting:
                choice, event = await self._next(everyone_started=waiting <= started)
                self._check(event)
                self._observe(choice, event, last)
                started.add(choice)
                if event.finish_reason is not None:
                    waiting.discard(choice)
                yield choice, event
        finally:
            if waiting:
                self.cancel()

    def _listener(self, first: int) -> Listener:
        """Called from the engine's thread; when the loop is gone, nobody is left to be told."""

        def listen(event: StreamEvent) -> None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._events.put_nowait, (first + event.choice, event))

        return listen

    async def _next(self, *, everyone_started: bool) -> tuple[int, StreamEvent]:
        if not self._events.empty():
            return self._events.get_nowait()
        silence = self.deadlines.next_token_s if everyone_started else self.deadlines.first_token_s
        left = self._begin + self.deadlines.total_s - time.monotonic()
        try:
            # Not wait_for: until Python 3.12 it forgets a cancellation that comes together with an event.
            async with asyncio.timeout(max(0.0, min(silence, left))):
                return await self._events.get()
        except TimeoutError:
            self.facts.problem = "deadline"
            if left <= silence:
                message = f"the answer took longer than {self.deadlines.total_s:g} s: ask for fewer tokens"
                raise ApiError(504, message, code="deadline_exceeded") from None
            message = f"the engine gave no token for {silence:g} s: it is overloaded, or hangs"
            raise ApiError(503, message, code="engine_timeout", headers={"Retry-After": "5"}) from None

    def _check(self, event: StreamEvent) -> None:
        if event.finish_reason == "error":
            self.facts.problem = event.error
            raise engine_failed(event.error, self.facts.request_id)
        if event.finish_reason == "cancelled":  # not by us: we have stopped listening then
            raise busy("the server is shutting down")

    def _observe(self, choice: int, event: StreamEvent, last: dict[int, float]) -> None:
        now = time.monotonic()
        if event.pieces:
            if self.facts.first_token_s is None:
                self.facts.first_token_s = now - self._begin
                self.metrics.first_token(self.facts.first_token_s)
            if choice in last:
                self.metrics.between_tokens((now - last[choice]) / len(event.pieces), len(event.pieces))
            last[choice] = now
            self.facts.completion_tokens += len(event.pieces)
            self.metrics.gate_weights(event.pieces)
        if event.finish_reason is not None:
            self.facts.finish_reasons.append(event.finish_reason)
