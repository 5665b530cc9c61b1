"""What no client should send: every row of the table of faults that is about what a request says.

A row passes when the answer is a 4xx in OpenAI's shape without traceback or path, and the server goes on answering.
"""

import itertools
import json
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server_helpers import ASK, MODEL, FakeEngine, Served, serving
from ultrafuser.server.strict_json import parse_json

COMPLETION = {"model": MODEL, "prompt": "ab"}
JSON = {"Content-Type": "application/json"}
OUTBOUND: list[Any] = []
sys.addaudithook(lambda name, args: OUTBOUND.append(args) if name == "socket.connect" else None)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(FakeEngine("hello")) as served:
        yield served


def assert_refused(served: Served, response: Any, *statuses: int) -> Any:
    """An error in OpenAI's shape that tells nothing about us; then the server answers."""
    assert response.status_code in (statuses or (400,)), response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    assert "/src/" not in response.text
    assert len(response.text) < 2000
    assert served.answers()
    return error


def post(served: Served, body: bytes, path: str = "/v1/chat/completions", **headers: str) -> Any:
    return served.client.post(path, content=body, headers=JSON | headers)


GOOD = json.dumps(ASK).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b"[]",
        b"[1]",
        b'"text"',
        b"1",
        b"null",
        b"\xef\xbb\xbf" + GOOD,
        GOOD + b"x",
        GOOD + GOOD,
        GOOD[:-1] + b',"model":"tiny"}',
        GOOD.replace(b"hi", b"\\ud800"),
        GOOD.replace(b"hi", b"\\udc00x"),
        GOOD.replace(b"hi", b"\\u0000"),
        GOOD.replace(b"hi", b"\0"),
        GOOD.replace(b"hi", b"\xff\xfe"),
        GOOD.replace(b"hi", b"\xed\xa0\x80"),
        GOOD.decode().encode("utf-16"),
        GOOD[:-1] + b',"temperature":NaN}',
        GOOD[:-1] + b',"temperature":Infinity}',
        GOOD[:-1] + b',"temperature":1e999}',
        GOOD[:-1] + b',"seed":' + b"9" * 5000 + b"}",
        b'{"a":' * 30 + b"1" + b"}" * 29,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_row_1_what_is_no_json(served: Served, body: bytes):
    assert_refused(served, post(served, body))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_row_1_any_bytes(served: Served, body: bytes):
    assert post(served, body).status_code in (400, 404)


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**60), 2**60)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_row_1_what_is_json_is_read_as_it_is(value: Any):
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'], ids=repr)
def test_row_2_deep_json(served: Served, opening: bytes):
    begin = time.monotonic()

    error = assert_refused(served, post(served, opening * 10_000))

    assert "deep" in error["message"]
    assert time.monotonic() - begin < 2


def test_row_2_brackets_in_a_string_are_text(served: Served):
    assert served.ask(messages=[{"role": "user", "content": '[["{{' * 100}]).status_code == 200


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "text/plain;application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=utf-16",
        "application/json; charset=x; charset=utf-8",
        "application/jsonp",
        "application/vnd.api+json",
    ],
)
def test_row_4_other_types_of_content(served: Served, content_type: str | None):
    headers = {} if content_type is None else {"Content-Type": content_type}

    assert_refused(served, served.client.post("/v1/chat/completions", content=GOOD, headers=headers), 415)


def test_row_4_compressed_bodies(served: Served):
    assert_refused(served, post(served, GOOD, **{"Content-Encoding": "gzip"}), 415)


def test_row_4_utf_8_may_be_said(served: Served):
    response = served.client.post(
        "/v1/chat/completions", content=GOOD, headers={"Content-Type": 'Application/JSON; charset="UTF-8"'}
    )

    assert response.status_code == 200


NUMBERS = {
    "max_tokens": "integer",
    "max_completion_tokens": "integer",
    "temperature": "number",
    "top_p": "number",
    "top_k": "integer",
    "min_p": "number",
    "presence_penalty": "number",
    "frequency_penalty": "number",
    "repetition_penalty": "number",
    "seed": "integer",
    "n": "integer",
    "top_logprobs": "integer",
    "min_tokens": "integer",
    "logprobs": "integer",
    "best_of": "integer",
}
MAY_BE_ZERO = {
    "temperature",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
    "logprobs",
}
MAY_BE_NEGATIVE = {"presence_penalty", "frequency_penalty"}


def bad_numbers(name: str) -> list[str]:
    values = ["NaN", "Infinity", "-Infinity", str(2**63), "1e308", '"5"', "true", "[1]", "{}", "1e999"]
    values += [] if name in MAY_BE_NEGATIVE else ["-1"]
    values += [] if name in MAY_BE_ZERO | {"top_logprobs"} else ["0"]
    return values + (["1.5"] if NUMBERS[name] == "integer" else [])


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in NUMBERS for value in bad_numbers(name)])
def test_row_7_numbers_out_of_range_or_of_another_type(served: Served, name: str, value: str):
    chat = name not in ("logprobs", "best_of")
    body = json.dumps((ASK | ({"logprobs": True} if name == "top_logprobs" else {})) if chat else COMPLETION)
    path = "/v1/chat/completions" if chat else "/v1/completions"

    assert_refused(served, post(served, f'{body[:-1]},"{name}":{value}}}'.encode(), path))


def test_row_7_every_numeric_field_is_in_the_list(served: Served):
    """A new field with a number must join the test above."""
    schemas = served.client.get("/openapi.json").json()["components"]["schemas"]
    numeric = {
        name
        for schema in ("ChatRequest", "CompletionRequest")
        for name, field in schemas[schema]["properties"].items()
        for option in field.get("anyOf", [field])
        if option.get("type") in ("integer", "number")
    }

    assert numeric == set(NUMBERS)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"n": 16384}),
        ("/v1/completions", {"best_of": 3}),
        ("/v1/completions", {"best_of": 3, "n": 2}),
        ("/v1/completions", {"logprobs": -1}),
        ("/v1/completions", {"logprobs": 32000}),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}),
        ("/v1/chat/completions", {"top_logprobs": 2}),
        ("/v1/chat/completions", {"max_tokens": 2**31}),
        ("/v1/chat/completions", {"max_tokens": 100_000}),
        ("/v1/chat/completions", {"max_tokens": 3, "max_completion_tokens": 4}),
        ("/v1/chat/completions", {"max_tokens": 3, "min_tokens": 4}),
        ("/v1/completions", {"prompt": ["a"] * 257}),
        ("/v1/completions", {"prompt": ["a"] * 200, "n": 8}),
        ("/v1/completions", {"echo": True, "logprobs": 1, "stream": True}),
        ("/v1/chat/completions", {"stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {"stream": True, "stream_options": {"continuous_usage_stats": True}}),
        ("/v1/chat/completions", {"stream": "true"}),
        ("/v1/chat/completions", {"user": "u" * 257}),
    ],
    ids=str,
)
def test_row_8_too_much_of_a_good_thing(served: Served, path: str, fields: dict[str, Any]):
    base = ASK if "chat" in path else COMPLETION

    assert_refused(served, served.client.post(path, json=base | fields))


@pytest.mark.parametrize(
    "bias",
    [
        {"999999": 1},
        {"262": 1},
        {"abc": 1},
        {"-1": 1},
        {"1.0": 1},
        {"": 1},
        {" 5": 1},
        {"5": "1"},
        {"5": 101},
        {"5": True},
        {"5": None},
        [5],
        "5",
        {str(i): 1 for i in range(1025)},
    ],
    ids=lambda bias: str(bias)[:30],
)
def test_row_9_biases(served: Served, bias: Any):
    assert_refused(served, served.ask(logit_bias=bias))


def test_row_9_more_biases_than_a_body_holds(served: Served):
    assert_refused(served, served.ask(logit_bias={str(i): 1 for i in range(400_000)}), 413)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "hi",
        {},
        [None],
        ["hi"],
        [{}],
        [{"role": "user"}],
        [{"content": "hi"}],
        [{"role": "tool", "content": "hi"}],
        [{"role": "developer", "content": "hi"}],
        [{"role": "system|>x<|assistant", "content": "hi"}],
        [{"role": ["user"], "content": "hi"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": ["hi"]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}],
        [{"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}],
        [{"role": "user", "content": "hi", "name": "bob"}],
        [{"role": "assistant", "content": None, "tool_calls": []}],
        [{"role": "assistant", "content": "hi"}],
        [{"role": "user", "content": "hi"}] * 257,
        [{"role": "user", "content": "x" * (512 * 1024 + 1)}],
    ],
    ids=lambda messages: str(messages)[:60],
)
def test_row_10_messages(served: Served, messages: Any):
    assert_refused(served, served.ask(messages=messages))


@pytest.mark.parametrize(
    "name",
    [
        "chat_template", "chat_template_kwargs", "prompt_embeds", "tools", "tool_choice", "functions", "function_call",
        "guided_regex", "guided_json", "guided_grammar", "structured_outputs", "response_format", "logits_processors",
        "suffix", "store", "metadata", "modalities", "audio", "prediction", "reasoning_effort", "service_tier",
        "parallel_tool_calls", "mm_processor_kwargs", "prompt_logprobs", "use_beam_search", "extra", "__class__",
    ],
)  # fmt: skip
def test_row_12_fields_that_are_not_supported(served: Served, name: str):
    for value in ("{% for i in range(9) %}", {"type": "json_object"}, [{"parameters": {"pattern": "(a+)+$"}}], None):
        if name == "response_format" and value is None:
            continue
        error = assert_refused(served, served.ask(**{name: value}))

        assert name in str(error["param"])


def test_row_12_plain_text_is_the_format_there_is(served: Served):
    assert served.ask(response_format={"type": "text"}).status_code == 200


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "http://localhost:1/redirect",
        "http://127.0.0.1.nip.io/",
        "data:image/png;base64,AAAA",
    ],
)
def test_row_13_addresses_of_pictures_are_never_fetched(served: Served, url: str):
    served.answers()
    before = len(OUTBOUND)
    for part in ({"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x", "url": url}):
        response = served.ask(messages=[{"role": "user", "content": [part]}])
        assert response.status_code == 400

    ours = served.address
    assert [args for args in OUTBOUND[before:] if args[1][:2] != ours] == []


@pytest.mark.parametrize(
    "name", ["../../etc", "attacker/repo", "", "tiny/", "TINY", "x" * 2**20, "tiny\r\nX: y", "\x1b[2J"]
)
def test_row_14_other_models_are_not_looked_for(served: Served, name: str):
    served.answers()
    before = len(OUTBOUND)

    response = served.ask(model=name)

    assert [args for args in OUTBOUND[before:] if args[1][:2] != served.address] == []
    assert assert_refused(served, response, 404)["code"] == "model_not_found"


HARD_TEXTS = {
    "spaces": " " * 200_000,
    "one word": "a" * 200_000,
    "zalgo": "Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f\u0334\u0319\u0324" * 10_000,
    "quotes": "'" * 200_000,
    "digits": "1" * 200_000,
    "newlines": "\n \n" * 60_000,
}


@pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_row_18_texts_that_are_too_long(served: Served, text: str, path: str):
    body = {"model": MODEL} | ({"prompt": text} if path == "/v1/completions" else {})
    body |= {} if "prompt" in body else {"messages": [{"role": "user", "content": text}]}
    begin = time.monotonic()

    response = served.client.post(path, json=body)

    assert time.monotonic() - begin < 1
    assert assert_refused(served, response)["code"] == "context_length_exceeded"


def test_row_18_a_prompt_that_fills_the_context(served: Served):
    def ask(length: int) -> Any:
        return served.client.post("/v1/completions", json={"model": MODEL, "prompt": [70] * length})

    assert ask(served.engine.max_context - 1).json()["usage"]["completion_tokens"] == 1
    assert_refused(served, ask(served.engine.max_context))


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [""], [-1], [262], [2**31], [1.5], [True], [[1], "a"], {}, None, 5], ids=str
)
def test_prompts_that_are_none(served: Served, prompt: Any):
    assert_refused(served, served.client.post("/v1/completions", json={"model": MODEL, "prompt": prompt}))


@pytest.mark.parametrize(
    "stop", ["", [""], ["a", ""], ["x"] * 17, ["x"] * 1000, "x" * 257, [1], 5, {}], ids=lambda s: str(s)[:20]
)
def test_row_19_stops_that_are_none(served: Served, stop: Any):
    assert_refused(served, served.ask(stop=stop))


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body",
    [{}, [], {"tokens": [-1]}, {"tokens": [999999]}, {"tokens": ["a"]}, {"prompt": 1}, {"prompt": "a", "messages": []}],
    ids=str,
)
def test_the_tokenizer_is_asked_as_strictly(served: Served, path: str, body: Any):
    assert_refused(served, served.client.post(path, json=body))


def test_one_field_is_named_in_an_error(served: Served):
    error = assert_refused(served, served.ask(temperature=3))

    assert error["param"] == "temperature"
    assert error["type"] == "invalid_request_error"


def test_a_long_name_of_a_field_is_not_sent_back(served: Served):
    assert_refused(served, served.ask(**{"x" * 100_000: 1}))


def test_no_combination_of_two_fields_makes_the_server_fail(served: Served):
    fields: list[dict[str, Any]] = [
        {"stream": True}, {"n": 2}, {"logprobs": True}, {"fusion": {"weights": True}}, {"max_tokens": 1}, {"stop": "l"},
    ]  # fmt: skip
    for first, second in itertools.combinations(fields, 2):
        assert served.ask(**first, **second).status_code == 200


def test_the_hook_sees_connections():
    """Else rows 13 and 14 would prove nothing."""
    before = len(OUTBOUND)
    with socket.socket() as connection:
        assert connection.connect_ex(("127.0.0.1", 1)) != 0

    assert len(OUTBOUND) > before
