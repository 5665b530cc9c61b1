"""Clients that misbehave below HTTP: slow, huge, broken, gone. The server stays quick for everybody else."""

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from server_helpers import ASK, MODEL, FakeEngine, Served, eventually, make_engine, num_files, raw, rss_bytes, serving
from ultrafuser.engine.requests import Ids
from ultrafuser.server.settings import Deadlines, Limits

QUICK = Deadlines(read_s=0.5, write_s=0.5)
BODY = json.dumps(ASK).encode()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(FakeEngine("hello"), deadlines=QUICK) as served:
        assert served.answers()
        yield served


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each fault the file handles are as before."""
    if "served" in request.fixturenames:
        request.getfixturevalue("served")
    before = num_files()
    yield
    assert eventually(lambda: num_files() <= before + 2), (before, num_files())


def head(path: str = "/v1/chat/completions", method: str = "POST", **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def status(answer: bytes) -> int | None:
    """The status of a raw answer; None where the connection was closed without one."""
    return int(answer.split(b" ", 2)[1]) if answer else None


def is_cut_off(connection: socket.socket, data: bytes, *, within_s: float) -> bool:
    """Whether the server ends a connection on which the same data comes again and again."""
    end = time.monotonic() + within_s
    try:
        while time.monotonic() < end:
            connection.sendall(data)
            time.sleep(0.05)
    except OSError:
        return True
    return False


def test_row_3_a_gigabyte_that_is_declared(served: Served):
    answer = raw(served.address, head(Content_Type="application/json", Content_Length=str(10**9)))

    assert status(answer) == 413
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_large"
    assert served.answers()


def test_row_3_a_gigabyte_that_is_sent(served: Served):
    before, piece = rss_bytes(), b" " * 2**20
    for how in ({"Content_Length": str(10**9)}, {"Transfer_Encoding": "chunked"}):
        with socket.create_connection(served.address, timeout=5) as connection:
            connection.sendall(head(Content_Type="application/json", **how))
            data = b"100000\r\n" + piece + b"\r\n" if "Transfer_Encoding" in how else piece
            assert is_cut_off(connection, data, within_s=10)
    assert rss_bytes() - before < 64 * 2**20
    assert served.answers()


def test_row_3_a_body_over_the_limit_without_a_length(served: Served):
    def body() -> Iterator[bytes]:
        for _ in range(3):
            yield b" " * 2**20

    response = httpx.post(
        f"{served.url}/v1/chat/completions", content=body(), headers={"Content-Type": "application/json"}
    )

    assert response.status_code == 413


@pytest.mark.parametrize("length", ["-1", "abc", "5, 6", "+5", "1e3", "99999999999999999999999"])
def test_row_3_lengths_that_are_none(served: Served, length: str):
    assert status(raw(served.address, head(Content_Type="application/json", Content_Length=length) + BODY)) in (
        400,
        413,
        None,
    )
    assert served.answers()


def test_row_3_two_lengths_or_both_ways_to_tell_it(served: Served):
    for extra in (
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
    ):
        data = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + extra
            + b"\r\n{}"
        )
        assert status(raw(served.address, data)) in (400, 408, None)
    assert served.answers()


def test_row_3_a_body_that_breaks_off(served: Served):
    with socket.create_connection(served.address) as connection:
        connection.sendall(head(Content_Type="application/json", Content_Length="1000") + b'{"model"')
    assert served.answers()


def test_row_5_a_body_that_drips(served: Served):
    with socket.create_connection(served.address, timeout=5) as connection:
        connection.sendall(head(Content_Type="application/json", Content_Length=str(len(BODY))))
        begin = time.monotonic()
        try:
            for byte in BODY:
                connection.sendall(bytes([byte]))
                time.sleep(0.1)
        except OSError:
            pass
        answer = connection.recv(65536)

    assert status(answer) == 408
    assert time.monotonic() - begin < 15
    assert served.answers()


def test_row_5_heads_that_never_end(served: Served):
    """Two hundred at once; others are served meanwhile, and all are gone in time."""
    connections = [socket.create_connection(served.address, timeout=5) for _ in range(200)]
    for number, connection in enumerate(connections):
        connection.sendall(b"" if number % 2 else b"GET / HTTP/1.1\r\nHost: loc")
    begin = time.monotonic()

    assert served.answers()
    for connection in connections:
        with connection:
            assert status(connection.recv(65536)) in (408, None)
    assert time.monotonic() - begin < 5


def test_row_5_a_body_that_nobody_asked_for_drips(served: Served):
    with socket.create_connection(served.address, timeout=10) as connection:
        connection.sendall(head("/version", "GET", Content_Length="1000000"))
        assert status(connection.recv(65536)) == 200
        assert is_cut_off(connection, b"x", within_s=8)


def test_row_6_heads_that_are_too_large(served: Served):
    one = head("/version", "GET", X_Long="x" * 65536, Connection="close")
    many = head("/version", "GET", Connection="close", **{f"X-{i}": "y" for i in range(5000)})
    some = head("/version", "GET", Connection="close", **{f"X-{i}": "y" for i in range(150)})
    url = head("/version?" + "a" * 10_000, "GET", Connection="close")

    assert status(raw(served.address, one)) == 431
    assert status(raw(served.address, many)) == 431
    assert status(raw(served.address, some)) == 431
    assert status(raw(served.address, url)) == 414
    assert served.answers()


def test_row_6_a_head_that_grows(served: Served):
    with socket.create_connection(served.address, timeout=5) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\nX: ")
        try:
            for _ in range(100):
                connection.sendall(b"x" * 1000)
                time.sleep(0.002)
        except OSError:
            pass
        assert status(connection.recv(65536)) == 431


def test_row_6_ranges_of_the_page_are_ignored(served: Served):
    ranges = "bytes=" + ",".join(["0-"] * 2000)
    begin = time.monotonic()

    response = served.client.get("/page/script.js", headers={"Range": ranges})

    assert response.status_code == 200
    assert "content-range" not in response.headers
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n" * 50,
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
        b"GET / HTTP/9.9\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"G\0T / HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_http_is_answered_in_json_or_closed(served: Served, data: bytes):
    answer = raw(served.address, data)

    assert status(answer) in (400, 404, 408, None)
    if answer:
        assert set(json.loads(answer.partition(b"\r\n\r\n")[2])) == {"error"}
    assert served.answers()


def test_an_upgrade_to_a_web_socket_is_not_made(served: Served):
    headers = {"Connection": "Upgrade, close", "Upgrade": "websocket", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}

    assert status(raw(served.address, head("/version", "GET", **headers))) == 200


def test_requests_in_one_piece_are_answered_in_turn(served: Served):
    one = head(Content_Type="application/json", Content_Length=str(len(BODY))) + BODY
    last = head("/version", "GET", Connection="close")

    assert raw(served.address, one * 3 + last).count(b"HTTP/1.1 200") == 4


def many_clients(served: Served) -> httpx.Client:
    """As many connections as are asked for at once."""
    return httpx.Client(base_url=served.url, timeout=60, limits=httpx.Limits(max_connections=None))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["before the first token", "in the middle", "with a reset"])
def test_row_20_a_client_that_goes_away_frees_everything(stream: bool, when: str):
    engine = FakeEngine("x" * 1000, delay_s=0.5 if when == "before the first token" else 0.01)
    with serving(engine) as served:
        body = json.dumps(ASK | {"stream": stream}).encode()
        with socket.create_connection(served.address) as connection:
            connection.sendall(head(Content_Type="application/json", Content_Length=str(len(body))) + body)
            assert eventually(lambda: engine.stats().num_running == 1)
            if when == "in the middle":
                assert eventually(lambda: engine.written > 5)
            if when == "with a reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        assert served.is_idle(within_s=2.0)  # one second, and one for a busy machine
        assert engine.num_cancelled == 1


class SlowEncoder(FakeEngine):
    """Encodes a prompt only when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.may = threading.Event(), threading.Event()

    def encode_text(self, text: str) -> tuple[Ids, ...]:
        self.asked.set()
        assert self.may.wait(10)
        return super().encode_text(text)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_row_20_what_nobody_waits_for_never_reaches_the_engine(path: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "ultrafuser.server")
    body = json.dumps(ASK if "chat" in path else {"model": MODEL, "prompt": "hi"}).encode()
    engine = SlowEncoder()
    with serving(engine) as served:
        with socket.create_connection(served.address) as connection:
            connection.sendall(head(path, Content_Type="application/json", Content_Length=str(len(body))) + body)
            assert engine.asked.wait(5)
        assert eventually(lambda: not served.server.server_state.connections)  # the server has seen it
        caplog.clear()
        engine.may.set()

        assert eventually(lambda: len(caplog.records) == 1)
        assert vars(caplog.records[0])["fields"]["status"] == 499
        assert not engine.requests
        assert served.answers()


def test_row_20_two_hundred_impatient_clients():
    """vLLM's test: short deadlines of clients on long answers; then one is answered at once, and no slot is lost."""
    with serving(make_engine(max_choices=4)) as served:
        served.answers(10.0)
        before = num_files()

        def impatient(number: int) -> None:
            stream = bool(number % 2)
            body = ASK | {"max_tokens": 200, "ignore_eos": True, "stream": stream}
            wait_s = 0.05 if stream else 0.05 + 0.002 * number
            try:
                client.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(5, read=wait_s))
            except httpx.TransportError:
                return

        with many_clients(served) as client, ThreadPoolExecutor(32) as pool:
            list(pool.map(impatient, range(200)))

        assert served.is_idle(5.0)
        assert served.ask(max_tokens=4).status_code == 200
        assert served.is_idle()
        assert eventually(lambda: num_files() <= before + 2)


def test_row_20_closing_after_the_end_is_harmless(served: Served):
    with served.client.stream("POST", "/v1/chat/completions", json=ASK | {"stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]

    assert lines[-1] == "data: [DONE]"
    assert served.is_idle()


def small_reader(served: Served, body: Any) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(10)
    connection.connect(served.address)
    data = json.dumps(body).encode()
    connection.sendall(head(Content_Type="application/json", Content_Length=str(len(data))) + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reads", [0, 1])
def test_row_21_a_client_that_does_not_read_is_dropped(stream: bool, reads: int):
    """Zero bytes a second, or a few; meanwhile another stream is whole."""
    engine = FakeEngine(lambda asked: "y" * 100 if asked == "long" else "h", wide=100_000)  # 10 MB, 100 kB
    with serving(engine, deadlines=QUICK) as served:
        served.answers()
        before = num_files()
        messages = [{"role": "user", "content": "long"}]
        connection = small_reader(served, ASK | {"messages": messages, "stream": stream})
        begin = time.monotonic()
        with connection:
            while num_files() > before + 1 and time.monotonic() - begin < 20:
                if reads:
                    connection.recv(reads)
                assert served.ask(stream=True).text.endswith("data: [DONE]\n\n")
                time.sleep(0.1)
            assert time.monotonic() - begin < 20
        assert served.is_idle()
        assert served.answers()


def test_row_22_five_hundred_at_once():
    """Some are served, the others told to come again; nobody waits for ever, nothing is left."""
    engine = FakeEngine("hello", delay_s=0.01, num_slots=8, max_waiting=100)
    with serving(engine) as served:
        codes: list[int] = []

        def ask(number: int) -> None:
            response = client.post("/v1/chat/completions", json=ASK | {"stream": number % 2 == 0})
            if response.status_code == 503:
                assert response.headers["retry-after"]
            codes.append(response.status_code)

        with many_clients(served) as client, ThreadPoolExecutor(500) as pool:
            list(pool.map(ask, range(500)))

        assert len(codes) == 500
        assert set(codes) <= {200, 503}
        assert codes.count(200) >= 100
        assert served.is_idle()
        assert served.answers()


def test_row_22_a_batch_that_does_not_fit_leaves_nothing_in_the_queue():
    engine = FakeEngine("hello", delay_s=0.05, num_slots=1, max_waiting=3)
    with serving(engine) as served:
        response = served.client.post("/v1/completions", json={"model": "tiny", "prompt": ["a"] * 6})

        assert response.status_code == 503
        assert response.json()["error"]["code"] == "overloaded"
        assert served.is_idle()
        assert 'admission_rejections_total{reason="queue"} 1.0' in served.client.get("/metrics").text


def test_row_22_more_connections_than_allowed():
    with serving(FakeEngine("hello"), limits=Limits(num_connections=5)) as served:
        served.answers()
        held = [socket.create_connection(served.address) for _ in range(4)]
        answer = raw(served.address, head("/version", "GET"))
        for connection in held:
            connection.close()

        assert status(answer) in (503, None)
        assert eventually(served.answers)
