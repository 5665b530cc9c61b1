"""EngineThread: one thread owns the model; every other thread submits, cancels and waits."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from ultrafuser.chat.messages import Conversation
from ultrafuser.engine.choice import Choice, State
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.memory import is_out_of_memory
from ultrafuser.engine.requests import EngineStats, GenerationRequest, Ids, Listener, StreamEvent
from ultrafuser.errors import BusyError

log = logging.getLogger(__name__)


class Handle:
    """A request that was taken; `cancel` stops it."""

    def __init__(self, owner: EngineThread) -> None:
        self._owner = owner
        self._choices: list[Choice] = []
        self._cancelled = False

    def cancel(self) -> None:
        """Stop all its choices and free their slots; each ends with "cancelled". Harmless when it is over."""
        self._owner._cancel(self)


class EngineThread:
    """An engine and the thread that runs it.

    Args:
        engine: Nobody else may use it from now on.
        max_waiting: Choices that may wait for a slot; with more, `submit` refuses.
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 256) -> None:
        self._engine = engine
        self._max_waiting = max_waiting
        self.names: list[str] = engine.names
        self.max_context: int = engine.max_context
        self.vocab_size: int = engine.vocab_size
        self.tokenizer: Any = engine.tokenizer
        self.end_ids: frozenset[int] = engine.end_ids
        self._lock = threading.Condition()
        self._inbox: deque[tuple[Handle, GenerationRequest, Listener]] = deque()
        self._inbox_choices = self._num_waiting = 0
        self._cancels: list[Handle] = []
        self._draining = self._closing = self._idle = False
        self._failure: str | None = None
        self._stats = engine.stats()
        self._thread = threading.Thread(target=self._run, name="ultrafuser-engine", daemon=True)
        self._thread.start()

    def encode_conversation(self, conversation: Conversation) -> tuple[Ids, ...]:
        """One row per specialist, each in its own template; what users write like a control token stays text.

        Raises:
            DataError: It does not end with a user message, or its prompt is empty.
            TemplateError: A template cannot write it.
        """
        return self._engine.encoder.encode_prompt(conversation, plain=True)

    def encode_text(self, text: str) -> tuple[Ids, ...]:
        """Plain text: the same row for every specialist."""
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return (ids,) * len(self.names)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def submit(self, request: GenerationRequest, listener: Listener) -> Handle:
        """Queue a request; events of its choices go to `listener`, called from the engine's thread: it must not block.

        Raises:
            RequestError: It can never be served (too long, unknown specialist, parameter out of range).
            BusyError: The queue is full, or the engine drains or has failed.
        """
        self._engine.check(request)
        with self._lock:
            if self._failure is not None:
                raise BusyError(f"the engine has stopped: {self._failure}")
            if self._draining or self._closing:
                raise BusyError("the engine is shutting down and takes nothing new")
            waiting = self._inbox_choices + self._num_waiting
            if waiting + request.params.n > self._max_waiting:
                raise BusyError(f"{waiting} choices are waiting already, {self._max_waiting} may: try again later")
            handle = Handle(self)
            self._inbox.append((handle, request, listener))
            self._inbox_choices += request.params.n
            self._lock.notify_all()
            return handle

    def stats(self) -> EngineStats:
        """Figures of now."""
        return self._stats

    @property
    def failure(self) -> str | None:
        """Why the engine's thread has ended, or None while it lives."""
        return self._failure

    def drain(self, timeout_s: float) -> bool:
        """Take nothing new and wait for what runs; False when time ran out."""
        with self._lock:
            self._draining = True
            self._lock.notify_all()
            return self._lock.wait_for(lambda: (self._idle and not self._inbox) or self._failure is not None, timeout_s)

    def close(self, timeout_s: float | None = None) -> bool:
        """End what is left and the thread; with a timeout, do not wait longer for a step that hangs.

        Returns:
            Whether the thread has ended.
        """
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _cancel(self, handle: Handle) -> None:
        with self._lock:
            self._cancels.append(handle)
            self._lock.notify_all()

    def _run(self) -> None:
        try:
            while self._next_round():
                self._step()
        except Exception as error:  # the thread ends: whoever waits must hear of it
            log.exception("the engine has stopped")
            self._fail(f"{type(error).__name__}: {error}".splitlines()[0])
            return
        self._engine.fail_all("the engine was closed")

    def _step(self) -> None:
        """One round; what does not fit into memory ends, and the engine goes on."""
        try:
            self._engine.step()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            log.warning("out of memory: everything that ran was ended")
            self._engine.fail_all("out of memory: ask for less, or again when less is running")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _next_round(self) -> bool:
        """Take what came in; wait where there is nothing to do. False when the thread shall end."""
        with self._lock:
            while True:
                self._take_in()
                self._stats = stats = self._engine.stats()
                # What was taken in counts while this round runs, but for what finds a free slot in it.
                self._num_waiting = max(stats.num_waiting - (stats.num_slots - stats.num_running), 0)
                busy = self._engine.has_work
                self._idle = not busy
                if self._closing:
                    return False
                if busy:
                    return True
                self._lock.notify_all()
                self._lock.wait()

    def _take_in(self) -> None:
        while self._inbox:
            handle, request, listener = self._inbox.popleft()
            self._inbox_choices -= request.params.n
            handle._choices = self._engine.add(request, _guarded(handle, listener))
        for handle in self._cancels:
            for choice in handle._choices:
                choice.cancelled = choice.state is not State.FINISHED
        self._cancels.clear()

    def _fail(self, reason: str) -> None:
        with self._lock:
            self._failure = reason
            self._take_in()
            self._engine.fail_all(f"the engine has stopped: {reason}")
            self._lock.notify_all()


def _guarded(handle: Handle, listener: Listener) -> Listener:
    """A listener whose own failure ends its request and nothing else."""

    def listen(event: StreamEvent) -> None:
        try:
            listener(event)
        except Exception:
            log.exception("a listener failed; its request is cancelled")
            for choice in handle._choices:
                choice.cancelled = True

    return listen
