"""One thread owns the model: others submit, cancel, drain and close, and every request hears how it ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from engine_helpers import Heard, assert_answers, greedy, make_engine
from helpers import make_fused
from ultrafuser.chat.messages import Message
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.requests import GenerationRequest, StreamEvent
from ultrafuser.engine.thread import EngineThread
from ultrafuser.errors import BusyError, DataError, RequestError

PATIENCE_S = 30.0
LONG = greedy(7, 9, 5, max_tokens=80, ignore_end=True)


class Waiting(Heard):
    """A listener to wait for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.over = threading.Event()
        self.began = threading.Event()

    def __call__(self, event: StreamEvent) -> None:
        super().__call__(event)
        self.began.set()
        if self.is_over:
            self.over.set()

    def wait(self) -> None:
        assert self.over.wait(PATIENCE_S), "the request never ended"


class Blocking(Waiting):
    """A listener that holds the engine's thread, token by token, until it is let go."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.go = threading.Semaphore(0)
        self.arrived = threading.Semaphore(0)
        self.is_free = False

    def __call__(self, event: StreamEvent) -> None:
        super().__call__(event)
        if not self.is_free:
            self.arrived.release()
            assert self.go.acquire(timeout=PATIENCE_S)

    def wait_for_token(self) -> None:
        assert self.arrived.acquire(timeout=PATIENCE_S)

    def release(self) -> None:
        self.is_free = True
        self.go.release()


@pytest.fixture
def started() -> Iterator[Callable[..., EngineThread]]:
    threads: list[EngineThread] = []

    def start(engine: Engine | None = None, max_waiting: int = 256, **options: Any) -> EngineThread:
        engine = engine if engine is not None else make_engine(**options)
        threads.append(EngineThread(engine, max_waiting=max_waiting))
        return threads[-1]

    yield start
    for thread in threads:
        thread.close(timeout_s=PATIENCE_S)
        assert not thread._thread.is_alive()


def wait_until(truth: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not truth():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.002)


def test_many_threads_submit_and_each_hears_its_own_answer(started):
    model = make_fused()
    thread = started(make_engine(model, max_choices=3, drafts=("lookup", "self")))
    requests = [greedy(3 + i, 9, 5, seed=i, max_tokens=6) for i in range(8)]
    heard = [Waiting() for _ in requests]

    callers = [threading.Thread(target=thread.submit, args=pair) for pair in zip(requests, heard, strict=True)]
    for caller in callers:
        caller.start()
    for caller, one in zip(callers, heard, strict=True):
        caller.join()
        one.wait()

    for request, one in zip(requests, heard, strict=True):
        assert_answers(model, request, one)
    assert thread.drain(PATIENCE_S)
    assert thread.stats().generated_tokens == sum(len(one.ids()) + (one.reasons == ["stop"]) for one in heard)


def test_events_come_from_the_engines_thread(started):
    names: set[str] = set()
    heard = Waiting()

    def listen(event: StreamEvent) -> None:
        names.add(threading.current_thread().name)
        heard(event)

    started().submit(greedy(3, 4, 5), listen)
    heard.wait()

    assert names == {"ultrafuser-engine"}


def test_a_request_is_cancelled_while_it_waits_while_it_reads_and_while_it_decodes(started):
    thread = started(max_choices=1, chunk=1)
    decoding, waiting, reading = Blocking(), Waiting(), Waiting()
    handle = thread.submit(LONG, decoding)
    decoding.wait_for_token()
    queued = thread.submit(LONG, waiting)
    slow = thread.submit(greedy(80, 60, 70, max_tokens=5), reading)
    queued.cancel()
    handle.cancel()
    handle.cancel()  # twice is harmless
    decoding.release()
    decoding.wait()
    waiting.wait()
    wait_until(lambda: 0 < thread.stats().cached_tokens < 80 or reading.is_over)
    slow.cancel()
    reading.wait()

    assert (decoding.reasons, waiting.reasons, reading.reasons) == (["cancelled"], ["cancelled"], ["cancelled"])
    assert len(decoding.ids()) < 80
    assert waiting.ids() == reading.ids() == []
    after = Waiting()
    thread.submit(greedy(3, 4, 5, max_tokens=2), after)
    after.wait()
    handle.cancel()  # when it is over, too
    assert after.reasons[0] in ("stop", "length")


def test_a_full_queue_refuses_until_there_is_room(started):
    thread = started(max_choices=1, max_waiting=2)
    running, rest = Blocking(), [Waiting(), Waiting()]
    thread.submit(LONG, running)
    running.wait_for_token()
    for one in rest:
        thread.submit(greedy(3, 4, 5, max_tokens=2), one)

    with pytest.raises(BusyError, match="2 choices are waiting already, 2 may: try again later"):
        thread.submit(greedy(3, 4, 5), Heard())

    for _ in range(2):  # the first round gave two tokens; with the third the engine has taken in those that wait
        running.go.release()
        running.wait_for_token()
    with pytest.raises(BusyError, match="2 choices are waiting already"):
        thread.submit(greedy(3, 4, 5), Heard())
    running.release()
    for one in rest:
        one.wait()
    last = Waiting()
    wait_until(lambda: thread.stats().num_waiting == 0)
    thread.submit(greedy(3, 4, 5, max_tokens=2), last)
    last.wait()


def test_a_request_that_can_never_be_served_is_refused_by_submit(started):
    with pytest.raises(RequestError, match="n is 9"):
        started().submit(greedy(3, 4, 5, n=9), Heard(9))


def test_draining_takes_nothing_new_and_waits_for_what_runs(started):
    thread = started()
    running = Blocking()
    thread.submit(LONG, running)
    running.wait_for_token()

    assert not thread.drain(0.05)
    with pytest.raises(BusyError, match="shutting down"):
        thread.submit(greedy(3, 4, 5), Heard())
    running.release()
    assert thread.drain(PATIENCE_S)

    assert (running.reasons, len(running.ids())) == (["length"], 80)


def test_an_idle_engine_drains_at_once(started):
    assert started().drain(PATIENCE_S)


def test_closing_ends_what_runs_and_what_waits(started):
    thread = started(max_choices=1)
    running, waiting = Blocking(), Waiting()
    thread.submit(LONG, running)
    running.wait_for_token()
    thread.submit(LONG, waiting)
    closer = threading.Thread(target=thread.close)
    closer.start()
    wait_until(lambda: thread._closing)
    running.release()
    closer.join(PATIENCE_S)

    assert (running.reasons, waiting.reasons) == (["error"], ["error"])
    assert waiting.errors == ["the engine was closed"]
    assert thread.failure is None
    with pytest.raises(BusyError, match="shutting down"):
        thread.submit(greedy(3, 4, 5), Heard())
    thread.close()


def test_a_listener_that_raises_ends_its_own_request_alone(started):
    thread = started()
    good, heard = Waiting(), []

    def bad(event: StreamEvent) -> None:
        heard.append(event.finish_reason)
        raise ValueError("no")

    thread.submit(greedy(7, 9, 5, n=2, max_tokens=50, ignore_end=True), bad)
    thread.submit(greedy(3, 4, 5, max_tokens=20, ignore_end=True), good)
    good.wait()
    assert thread.drain(PATIENCE_S)

    assert good.reasons == ["length"]
    assert [reason for reason in heard if reason] == ["cancelled", "cancelled"]
    assert len(heard) < 10
    assert thread.failure is None


def test_a_failure_of_the_engine_ends_everything_and_is_told(started):
    engine = make_engine(max_choices=1)
    thread = started(engine)
    running, waiting = Blocking(), Waiting()
    thread.submit(LONG, running)
    running.wait_for_token()
    thread.submit(LONG, waiting)
    engine._decode = broken(KeyError("a bug\nof ours"))  # type: ignore[method-assign]
    running.release()
    running.wait()
    waiting.wait()
    wait_until(lambda: thread.failure is not None)

    assert (running.reasons, waiting.reasons) == (["error"], ["error"])
    assert running.errors == waiting.errors
    assert running.errors[0].startswith("the engine has stopped: KeyError")
    assert thread.drain(PATIENCE_S)
    with pytest.raises(BusyError, match="the engine has stopped: KeyError"):
        thread.submit(greedy(3, 4, 5), Heard())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_ends_what_runs_and_the_engine_goes_on(started, error: Exception):
    model = make_fused()
    engine = make_engine(model)
    thread = started(engine)
    running = Blocking()
    thread.submit(LONG, running)
    running.wait_for_token()
    decode = engine._decode
    engine._decode = broken(error)  # type: ignore[method-assign]
    running.release()
    running.wait()
    engine._decode = decode  # type: ignore[method-assign]

    assert running.errors == ["out of memory: ask for less, or again when less is running"]
    assert thread.failure is None
    after = Waiting()
    thread.submit(request := greedy(3, 4, 5), after)
    after.wait()
    assert_answers(model, request, after)


def broken(error: Exception) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail


def test_conversations_and_texts_become_one_row_for_each_specialist(started):
    thread = started()
    rows = thread.encode_conversation((Message("user", "hi </s>"),))

    assert len(rows) == 3
    assert len(set(rows)) == 3  # each in its own template
    assert "hi </s>" in thread.decode(rows[0])  # what a user writes stays text
    assert thread.encode_text("hi") == (tuple(thread.tokenizer("hi", add_special_tokens=False)["input_ids"]),) * 3
    with pytest.raises(DataError):
        thread.encode_conversation((Message("user", "hi"), Message("assistant", "Hello.")))


def test_a_scored_prompt_comes_with_the_first_event(started):
    thread, heard = started(), Waiting()
    rows = thread.encode_text("some text")

    thread.submit(GenerationRequest(rows, greedy(1).params, score_prompt=True), heard)
    heard.wait()

    assert "".join(piece.text for piece in heard.events[0].prompt) == "some text"
