"""Servers for tests: in a thread over a real tiny engine or a scripted one, and as processes that start in no time.

Run as a script this file imports everything once, then forks a child for each command line it reads, so that a test of
the whole command does not wait for imports.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from helpers import make_fused, make_tokenizer
from ultrafuser.chat.messages import Conversation
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.options import EngineOptions
from ultrafuser.engine.requests import EngineStats, GenerationRequest, Ids, Listener, StreamEvent, TokenPiece
from ultrafuser.engine.thread import EngineThread
from ultrafuser.errors import BusyError, DataError, RequestError
from ultrafuser.server.app import create_app
from ultrafuser.server.keys import KeyRing
from ultrafuser.server.preflight import bind
from ultrafuser.server.running import Server
from ultrafuser.server.settings import Deadlines, Limits, ServerSettings

MODEL = "tiny"
NAMES = ["text", "code", "math"]
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def make_engine(**options: Any) -> EngineThread:
    """The real engine over three tiny specialists in the paper's templates."""
    settings = {"max_context": 512, "max_choices": 4, **options}
    return EngineThread(Engine(make_fused(), make_tokenizer(), EngineOptions(**settings)), max_waiting=64)


class _Running:
    """A request of the scripted engine."""

    def __init__(self, owner: FakeEngine) -> None:
        self.owner, self.started = owner, False
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        with self.owner.lock:
            if not self.started and not self.cancelled.is_set():
                self.owner.num_waiting -= 1
                self.owner.num_cancelled += 1
            self.cancelled.set()


class FakeEngine(EngineThread):
    """The engine's interface, doing what a script says: each request answers with `reply`, a token a byte.

    Args:
        reply: The answer, or a function of the conversation's or prompt's text.
        delay_s: Before every token.
        fails_after: Tokens before an error; None for no error.
        error: Its text.
        hangs_after: Tokens before silence; None for no silence.
        num_slots: Requests at once.
        max_waiting: Requests in the queue.
        max_context: Tokens.
        wide: Each token's text is repeated so often.
    """

    def __init__(
        self,
        reply: str | Callable[[str], str] = "hello",
        *,
        delay_s: float = 0.0,
        fails_after: int | None = None,
        error: str = "",
        hangs_after: int | None = None,
        num_slots: int = 16,
        max_waiting: int = 256,
        max_context: int = 2000,
        wide: int = 1,
    ) -> None:
        self.reply, self.delay_s, self.fails_after, self.error = reply, delay_s, fails_after, error
        self.hangs_after, self.num_slots, self.max_waiting = hangs_after, num_slots, max_waiting
        self.names, self.max_context, self.tokenizer = list(NAMES), max_context, make_tokenizer()
        self.vocab_size, self.end_ids = len(self.tokenizer), frozenset({2})
        self.dead: str | None = None
        self.requests: list[GenerationRequest] = []
        self.running: set[_Running] = set()
        self.num_waiting = self.num_cancelled = self.written = 0
        self.wide, self.lock = wide, threading.Lock()
        self._slots = ThreadPoolExecutor(num_slots)

    def encode_conversation(self, conversation: Conversation) -> tuple[Ids, ...]:
        if conversation[-1].role != "user":
            raise DataError("a conversation to answer must end with a user message")
        return self.encode_text(conversation[-1].content)

    def encode_text(self, text: str) -> tuple[Ids, ...]:
        return (tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]),) * len(self.names)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def submit(self, request: GenerationRequest, listener: Listener) -> Any:
        if unknown := (set(request.without) | set(request.weights or ())) - set(self.names):
            raise RequestError(f"no specialist {min(unknown)!r}")
        with self.lock:
            if self.num_waiting >= self.max_waiting:
                raise BusyError("the queue is full")
            self.num_waiting += 1
            self.requests.append(request)
        handle = _Running(self)
        self._slots.submit(self._run, request, listener, handle)
        return handle

    def stats(self) -> EngineStats:
        with self.lock:
            running = len(self.running)
        return EngineStats(running, self.num_waiting, self.num_slots, 0, 0, self.written, 0, 0, self.written)

    @property
    def failure(self) -> str | None:
        return self.dead

    def drain(self, timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        while self.running and time.monotonic() < end:
            time.sleep(0.01)
        return not self.running

    def close(self, timeout_s: float | None = None) -> None:
        del timeout_s
        for handle in list(self.running):
            handle.cancel()
        self._slots.shutdown(wait=False)

    def _run(self, request: GenerationRequest, listener: Listener, handle: _Running) -> None:
        with self.lock:
            if handle.cancelled.is_set():
                return
            handle.started = True
            self.num_waiting -= 1
            self.running.add(handle)
        try:
            for choice in range(request.params.n):
                self._write(request, choice, listener, handle)
        finally:
            with self.lock:
                self.running.discard(handle)

    def _write(self, request: GenerationRequest, choice: int, listener: Listener, handle: _Running) -> None:
        asked = self.decode(request.prompts[0])
        reply = self.reply if isinstance(self.reply, str) else self.reply(asked)
        params = request.params
        ids = self.encode_text(reply)[0][: params.max_tokens]
        prompt = tuple(self._piece(token, None, params.log_probs) for token in request.prompts[0])
        if request.score_prompt and choice == 0:
            listener(StreamEvent(choice, prompt=prompt))
        raw = reply.encode()
        for position, token in enumerate(ids):
            if self.hangs_after == position:
                handle.cancelled.wait()
            if handle.cancelled.wait(self.delay_s) if self.delay_s else handle.cancelled.is_set():
                self.num_cancelled += 1
                listener(StreamEvent(choice, finish_reason="cancelled"))
                return
            if self.fails_after == position:
                listener(StreamEvent(choice, finish_reason="error", error=self.error))
                return
            before, after = (raw[:end].decode(errors="ignore") for end in (position, position + 1))
            self.written += 1
            listener(StreamEvent(choice, (self._piece(token, after[len(before) :] * self.wide, params.log_probs),)))
        whole = len(ids) == len(raw)
        listener(StreamEvent(choice, finish_reason="stop" if whole else "length"))

    def _piece(self, token: int, text: str | None, log_probs: int | None) -> TokenPiece:
        if text is None:
            text = self.decode([token])
        top = tuple((token + i, -0.5 - i) for i in range(log_probs or 0))
        return TokenPiece(token, text, (0.5, 0.3, 0.2), None if log_probs is None else -0.5, top)


@dataclass
class Served:
    """A server that runs.

    Attributes:
        url: Without a slash at the end.
        engine: Behind it.
        server: Its uvicorn.
        app: Its application.
    """

    url: str
    engine: Any
    server: Server
    app: Any
    client: httpx.Client = field(repr=False)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def ask(self, **changes: Any) -> httpx.Response:
        """A chat completion."""
        return self.client.post("/v1/chat/completions", json=ASK | changes)

    def answers(self, within_s: float = 2.0) -> bool:
        """The probe of every fault: is the server still there, and quick?"""
        begin = time.monotonic()
        response = self.ask(max_tokens=1)
        return response.status_code == 200 and time.monotonic() - begin < within_s

    def is_idle(self, within_s: float = 2.0) -> bool:
        """Nothing runs and nothing waits, soon."""
        return eventually(lambda: (stats := self.engine.stats()).num_running + stats.num_waiting == 0, within_s)


@contextmanager
def serving(
    engine: EngineThread,
    *,
    keys: Sequence[str] = (),
    limits: Limits = Limits(),
    deadlines: Deadlines = Deadlines(),
    **settings: Any,
) -> Iterator[Served]:
    """Run a server in a thread while the block lasts."""
    own = ServerSettings(model_name=MODEL, limits=limits, deadlines=deadlines, **settings)
    app = create_app(engine, own, KeyRing(keys))
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    ready = threading.Event()
    server = Server(app, ready.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    assert ready.wait(20)
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    try:
        with httpx.Client(base_url=url, timeout=30, headers=headers) as client:
            yield Served(url, engine, server, app, client)
    finally:
        server.should_exit = True
        thread.join(5)
        server.force_exit = True
        thread.join(20)
        engine.close(5.0)
        assert not thread.is_alive()


def eventually(claim: Callable[[], bool], within_s: float = 5.0) -> bool:
    """Whether a claim becomes true in time."""
    end = time.monotonic() + within_s
    while not claim():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def num_files() -> int:
    """Open file descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def rss_bytes(pid: int | str = "self") -> int:
    """Memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def raw(address: tuple[str, int], data: bytes, *, timeout_s: float = 5.0) -> bytes:
    """Send bytes, read to the end."""
    with socket.create_connection(address, timeout=timeout_s) as connection:
        try:
            connection.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return b""
        received = b""
        try:
            while piece := connection.recv(65536):
                received += piece
        except ConnectionResetError:
            pass
        return received


def events(response: httpx.Response) -> list[Any]:
    """The objects of a stream; the last one must be [DONE]."""
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@dataclass
class Command:
    """A command line that runs as a process of its own."""

    pid: int
    folder: Path

    @property
    def out(self) -> str:
        return self._read("out")

    @property
    def err(self) -> str:
        return self._read("err")

    @property
    def code(self) -> int | None:
        """Its exit code, None while it runs."""
        file = self.folder / "code"
        return int(file.read_text()) if file.exists() and file.read_text() else None

    def _read(self, name: str) -> str:
        file = self.folder / name
        return file.read_text() if file.exists() else ""

    def wait(self, within_s: float = 20.0) -> int:
        """Its exit code."""
        assert eventually(lambda: self.code is not None, within_s), self.err
        assert self.code is not None
        return self.code

    def url(self, within_s: float = 20.0) -> str:
        """The address that it prints when it is ready."""
        assert eventually(lambda: "http://" in self.out or self.code is not None, within_s), self.err
        assert "http://" in self.out, self.err
        return self.out.split()[-1]

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)


class Commands:
    """Starts command lines from a process that has imported everything."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "ULTRAFUSER_API_KEYS"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, folder: Path, *argv: str, **more: Any) -> Command:
        """Run `ultrafuser ARGV`; `more`: err (a file for stderr), nofile, address_space (limits; bytes to add), env."""
        folder.mkdir(parents=True, exist_ok=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"argv": argv, "folder": str(folder), **more}) + "\n")
        self._process.stdin.flush()
        return Command(int(self._process.stdout.readline()), folder)

    def close(self) -> None:
        """End it, and with it what still runs."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _fork_for_each_line() -> None:
    import ultrafuser.engine.load
    import ultrafuser.server.app
    import ultrafuser.server.process  # noqa: F401
    from ultrafuser.cli.main import run

    children = []
    for line in sys.stdin:
        order = json.loads(line)
        if child := os.fork():
            children.append(child)
            print(child, flush=True)
            continue
        folder = Path(order["folder"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, order.get("err", folder / "err"))):
            os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), number)
        for limit, value in ((resource.RLIMIT_NOFILE, "nofile"), (resource.RLIMIT_AS, "address_space")):
            if value in order:
                most = order[value] + (_address_space() if limit == resource.RLIMIT_AS else 0)
                resource.setrlimit(limit, (most, most))
        os.environ.update(order.get("env", {}))
        sys.argv = ["ultrafuser", *order["argv"]]
        code = 0
        try:
            run()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            code = 70
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            (folder / "code").write_text(str(code))
            os._exit(code)
    for child in children:
        try:
            os.kill(child, 9)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    _fork_for_each_line()
