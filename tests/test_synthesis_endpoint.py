"""The scripted endpoint keeps its promises, for every other test stands on them."""

from __future__ import annotations

import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import pytest

from synthesis_endpoint import Script, answer_text, serving, serving_process
from ultrafuser.synthesis.parsing import FORMATS, SCHEMAS, read_instruction, read_instructions, read_topics


def body_of(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": text}], **fields}


@pytest.mark.parametrize("name", sorted(SCHEMAS))
@pytest.mark.parametrize("by_schema", [True, False])
def test_answers_can_be_read_with_and_without_a_schema(name: str, by_schema: bool) -> None:
    schema = {"response_format": {"json_schema": {"schema": SCHEMAS[name]}}} if by_schema else {}
    text = answer_text(body_of(f"Write 7 of them. {FORMATS[name]}", **schema), Script())

    if name == "instruction":
        assert read_instruction(text)
    else:
        assert len((read_topics if name == "topics" else read_instructions)(text)) == 7


def test_an_answer_follows_from_the_request_alone_and_seeds_tell_requests_apart() -> None:
    one, again = (answer_text(body_of("hello", seed=1), Script()) for _ in range(2))

    assert one == again
    assert one != answer_text(body_of("hello", seed=2), Script())


def test_as_a_process_it_prints_its_address_and_counts() -> None:
    with serving_process(words=3) as url:
        request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body_of("hello")).encode())
        for _ in range(2):
            with urllib.request.urlopen(request) as response:
                text = json.load(response)["choices"][0]["message"]["content"]
        with urllib.request.urlopen(url.removesuffix("/v1") + "/calls") as response:
            calls = json.load(response)

    assert len(text.split()) <= 3
    assert (calls["total"], calls["distinct"], calls["repeated"]) == (2, 1, 1)


@pytest.mark.slow
def test_it_serves_more_than_five_hundred_requests_a_second() -> None:
    """Measured by connections that are kept open, which is what the client does."""

    def ask(url: str) -> None:
        connection = HTTPConnection(urlsplit(url).netloc)
        for number in range(200):
            connection.request("POST", "/v1/chat/completions", json.dumps(body_of(f"hello {number}")))
            connection.getresponse().read()
        connection.close()

    with serving_process() as url, ThreadPoolExecutor(4) as pool:
        start = time.perf_counter()
        list(pool.map(ask, [url] * 4))
        seconds = time.perf_counter() - start

    assert 800 / seconds > 500


def test_a_misspelt_field_of_the_script_is_an_error() -> None:
    with serving() as endpoint, pytest.raises(KeyError, match="no field 'latency'"):
        endpoint.script.change({"latency": 1})
