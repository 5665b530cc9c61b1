"""Who gets in: keys on every route, hosts, pages, rates, and what the log says about it."""

import base64
import json
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server_helpers import ASK, MODEL, FakeEngine, Served, eventually, raw, serving
from ultrafuser.errors import ConfigError
from ultrafuser.server.keys import KeyRing
from ultrafuser.server.settings import Limits

KEY, OTHER = "sk-right-key", "sk-other-key"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(FakeEngine("hello"), keys=[KEY, OTHER]) as served:
        yield served


@pytest.fixture(scope="module")
def stranger(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=10) as client:
        yield client


def all_routes(served: Served) -> list[tuple[str, str]]:
    """Every method and path that the application has, and some that it has not."""
    routes = [
        (method, route.path.replace("{name}", "style.css"))
        for route in served.app.routes
        for method in [*route.methods, "OPTIONS", "HEAD"]
    ]
    return [*routes, ("GET", "/nothing"), ("GET", "/docs"), ("GET", "/redoc"), ("POST", "/health"), ("GET", "/health/")]


def test_row_16_nothing_is_open_but_health(served: Served, stranger: httpx.Client):
    """A route that is added later is in `app.routes`, and closed."""
    routes = all_routes(served)

    assert ("GET", "/health") in routes
    assert ("GET", "/openapi.json") in routes
    for method, path in routes:
        response = stranger.request(method, path)
        assert (response.status_code == 200) == ((method, path) == ("GET", "/health")), (method, path)
        if (method, path) != ("GET", "/health"):
            assert response.status_code == 401, (method, path)


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer wrong-key-here",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY.upper()}",
        f"Bearer Bearer {KEY}",
        f"Bearer {KEY} {KEY}",
        f"Token {KEY}",
        KEY,
        basic("wrong-key-here"),
        basic(""),
        "Basic !!!",
        f"Basic {KEY}",
        f"Bearer {KEY}, Bearer {OTHER}",
    ],
)
def test_row_16_wrong_keys(stranger: httpx.Client, header: str):
    response = stranger.get("/v1/models", headers={"Authorization": header})

    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert "Bearer" in response.headers["www-authenticate"]
    assert "Basic" in response.headers["www-authenticate"]


def test_row_16_keys_elsewhere_do_not_count(served: Served, stranger: httpx.Client):
    assert stranger.get(f"/v1/models?api_key={KEY}").status_code == 401
    assert stranger.get("/v1/models", headers={"X-Api-Key": KEY}).status_code == 401
    assert stranger.get("/v1/models", headers=[("Authorization", f"Bearer {KEY}")] * 2).status_code == 401
    assert stranger.get("/v1/models", headers=[(b"Authorization", "Bearer schlüssel".encode())]).status_code == 401
    for value in (b"Bearer \xff\xfe", b"Bearer ", b"Bearer \t"):
        head = (
            b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: " + value + b"\r\n\r\n"
        )
        assert b" 401 " in raw(served.address, head).split(b"\r\n")[0]


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {OTHER}", basic(KEY), basic(OTHER)])
def test_right_keys(stranger: httpx.Client, header: str):
    for path in ("/v1/models", "/", "/metrics", "/openapi.json"):
        assert stranger.get(path, headers={"Authorization": header}).status_code == 200


def test_openais_client_sends_its_key(served: Served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
        assert client.models.list().data[0].id == MODEL
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


@pytest.mark.parametrize(
    "path",
    [
        "/..%2fapp.py",
        "/page/..%2f..%2fapp.py",
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "//etc/passwd",
        "/page/",
        "/page",
        "/page/style.css%00.html",
        "/page//style.css",
        "/page/style.css/",
        "/page/nothing.js",
        "/page/..\\app.py",
        "/page/%c0%ae%c0%ae/app.py",
        "/%00",
        "/page/__init__.py",
        "/page/STYLE.css",
    ],
)
def test_row_15_ways_out_of_the_page(served: Served, path: str):
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"

    answer = raw(served.address, head.encode())

    assert answer.split(b"\r\n")[0].split()[1] == b"404", answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "", "localhost:x", "127.0.0.1:80:80"]
)
def test_row_17_other_hosts(served: Served, host: str):
    head = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"

    answer = raw(served.address, head.encode())

    assert b" 400 " in answer.split(b"\r\n")[0]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:99"])
def test_row_17_own_hosts(served: Served, host: str):
    assert served.client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_row_17_no_origin_is_allowed_in(served: Served):
    for origin in ("https://evil.example", "null", served.url):
        for method in ("GET", "OPTIONS"):
            headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            response = served.client.request(method, "/v1/models", headers=headers)
            assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_key_may_ask_so_often_a_minute():
    with serving(FakeEngine("x"), keys=[KEY, OTHER], limits=Limits(requests_per_minute=3)) as served:
        codes = [served.ask().status_code for _ in range(4)]
        refused = served.ask()
        other = served.client.post("/v1/chat/completions", json=ASK, headers={"Authorization": f"Bearer {OTHER}"})

        assert codes == [200, 200, 200, 429]
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert other.status_code == 200
        assert 'ultrafuser:admission_rejections_total{reason="rate"} 2.0' in served.client.get("/metrics").text


def test_a_key_may_ask_so_much_at_once():
    engine = FakeEngine("x" * 1900, delay_s=0.02)
    with serving(engine, limits=Limits(requests_at_once=1)) as served:
        body = ASK | {"stream": True}
        with served.client.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()  # kept: when it is gone, the stream is closed
            next(lines)
            assert served.ask().status_code == 429
        assert served.is_idle()
        # The engine is free a moment before the request's own end is counted.
        assert eventually(lambda: served.ask(max_tokens=1).status_code == 200)


def test_row_34_a_clock_that_jumps_lets_nobody_in_early():
    from ultrafuser.server.api_error import ApiError
    from ultrafuser.server.rates import Rates

    now = [100.0]
    rates = Rates(Limits(requests_per_minute=1), clock=lambda: now[0])
    with rates.taking("a"):
        pass
    for second, allowed in ((100.0, False), (159.0, False), (161.0, True), (162.0, False)):
        now[0] = second
        with nullcontext() if allowed else pytest.raises(ApiError, match="a minute"), rates.taking("a"):
            pass


def test_row_33_the_log_is_one_line_of_printable_characters(served: Served, caplog: pytest.LogCaptureFixture):
    from ultrafuser.server.log import _JsonFormatter

    secret = "my secret question"

    def lines() -> list[str]:
        return [_JsonFormatter().format(record) for record in caplog.records if record.name == "ultrafuser.server"]

    with caplog.at_level(logging.INFO, "ultrafuser.server"):
        served.ask(messages=[{"role": "user", "content": secret}], user="\r\n\x1b[2Jroot")
        served.ask(model="a\r\nb\x1b[2J\u202e")
        served.client.get("/nothing%0d%0a%1b[2J?key=" + KEY)
        served.client.get("/version", headers=[(b"X-Request-Id", b"a b")])
        assert eventually(lambda: len(lines()) == 4)  # a line follows its response

    for line in lines():
        assert line.isascii()
        assert line.isprintable()
        entry = json.loads(line)
        assert entry["event"] == "request"
        assert len(entry["request_id"]) == 32
        assert len(entry["key"]) == 8
        for word in (secret, KEY, "hello", "root", "nothing"):
            assert word not in line
    first = json.loads(lines()[0])
    assert (first["route"], first["status"], first["completion_tokens"]) == ("/v1/chat/completions", 200, 5)
    assert first["total_s"] >= first["first_token_s"] >= 0


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "keys"
    file.write_text(f"# mine\n{KEY}  # the first\n\n  {OTHER}\n")
    monkeypatch.setenv("ULTRAFUSER_API_KEYS", "sk-variable")

    ring = KeyRing.read(file)

    assert len(ring) == 2
    assert ring.find([f"Bearer {OTHER}".encode()])
    assert ring.find([b"Bearer sk-variable"]) is None
    assert KeyRing.read(None).find([b"Bearer sk-variable"])
    monkeypatch.delenv("ULTRAFUSER_API_KEYS")
    assert len(KeyRing.read(None)) == 0


@pytest.mark.parametrize(
    "content", ["", "# nothing\n\n", "short\n", "two words here\n", "schlüssel-lang\n", b"\xff\xfe\x00"]
)
def test_a_key_file_that_holds_none_is_an_error(tmp_path: Path, content: Any):
    file = tmp_path / "keys"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(ConfigError, match="key") as error:
        KeyRing.read(file)

    assert "schlüssel" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_ring_holds_no_key():
    """Who sees its memory through a bug sees hashes."""
    ring = KeyRing([KEY])

    assert KEY not in repr(vars(ring))
    assert KEY.encode() not in b"".join(ring._digests)
