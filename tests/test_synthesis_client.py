"""One address of an endpoint, over real HTTP: whatever happens there is an answer or a refusal with a meaning."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthesis_endpoint import Endpoint, serving
from synthesis_helpers import make_request
from ultrafuser.errors import ConfigError
from ultrafuser.synthesis.asking.endpoints.client import Client
from ultrafuser.synthesis.asking.endpoints.refusal import LONGEST_RETRY_AFTER_S, Refusal, retry_after_s
from ultrafuser.synthesis.asking.endpoints.usage import check_usage, estimate_tokens, most_prompt_tokens
from ultrafuser.synthesis.node import Answer, ChatMessage, Request
from ultrafuser.synthesis.recipe import EndpointConfig

KEY = "sk-very-secret-0123456789"


def ask(url: str, *requests: Request, **config: Any) -> list[Answer | Refusal]:
    """All results, one after another, by one client."""
    fields = {"url": url, "model": "scripted", "timeout_s": 5.0} | config

    async def go() -> list[Answer | Refusal]:
        async with Client("writer", EndpointConfig.model_validate(fields), url) as client:
            return [await client.ask(request) for request in requests]

    return asyncio.run(go())


def answer_of(result: Answer | Refusal) -> Answer:
    assert isinstance(result, Answer), result
    return result


def refusal_of(result: Answer | Refusal) -> Refusal:
    assert isinstance(result, Refusal), result
    return result


@pytest.fixture(scope="module")
def endpoint() -> Any:
    with serving() as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def _well_behaved(endpoint: Endpoint) -> None:
    endpoint.script.change(
        {"faults": {}, "key": None, "schema": True, "old_max_tokens": True, "html": False, "down": False}
        | {"retry_after": None, "model": "scripted"}
    )


def test_an_answer_has_text_usage_cost_and_model(endpoint: Endpoint) -> None:
    [answer] = ask(endpoint.url, make_request(), price={"input": 1e6, "output": 2e6})

    answer = answer_of(answer)

    assert answer.text
    assert answer.finish_reason == "stop"
    assert answer.model == "scripted"
    assert answer.cost == answer.prompt_tokens + 2 * answer.completion_tokens
    assert not answer.is_estimated
    assert answer.seconds > 0


def test_the_same_request_has_the_same_answer_and_another_seed_another(endpoint: Endpoint) -> None:
    one, again, other = ask(
        endpoint.url, make_request(1), make_request(1), make_request(1).model_copy(update={"seed": 9})
    )

    assert answer_of(one).text == answer_of(again).text != answer_of(other).text


def test_a_prompt_goes_to_completions_and_a_conversation_to_chat(endpoint: Endpoint) -> None:
    [answer] = ask(endpoint.url, make_request(prompt="<|user|>", stop=("</s>",)))

    assert answer_of(answer).text
    assert endpoint.calls.bodies[-1]["prompt"] == "<|user|>"
    assert endpoint.calls.bodies[-1]["stop"] == ["</s>"]
    assert "messages" not in endpoint.calls.bodies[-1]


def test_fields_of_the_recipe_are_sent(endpoint: Endpoint) -> None:
    ask(endpoint.url, make_request(3), extra_body={"min_p": 0.1})
    assert endpoint.calls.bodies[-1]["min_p"] == 0.1
    assert endpoint.calls.bodies[-1]["seed"] == 3

    ask(endpoint.url, make_request(3), send_seed=False)
    assert "seed" not in endpoint.calls.bodies[-1]


@pytest.mark.parametrize(
    ("fault", "kind", "is_attempt", "says"),
    [
        ("429", "overloaded", False, "429"),
        ("503", "overloaded", False, "503"),
        ("529", "overloaded", False, "529"),
        ("500", "passing", True, "scripted 500"),
        ("502", "passing", True, "502"),
        ("408", "timeout", True, "408"),
        ("402", "fatal", False, "no money left"),
        ("403", "fatal", False, "UNSET_KEY"),
        ("404", "fatal", False, "/v1"),
        ("400", "request", True, "400"),
        ("overlong", "request", True, "maximum context length"),
        ("malformed", "passing", True, "cannot be read"),
        ("truncated", "passing", True, "the connection ended"),
        ("reset", "passing", True, "the connection ended"),
        ("error", "passing", True, "upstream provider failed"),
        ("no_choices", "passing", True, "without a choice"),
        ("html", "fatal", False, "is the address up to /v1?"),
    ],
)
def test_every_fault_is_a_refusal_of_its_kind(
    endpoint: Endpoint, fault: str, kind: str, is_attempt: bool, says: str
) -> None:
    endpoint.script.faults = {fault: 1.0}

    refusal = refusal_of(ask(endpoint.url, make_request(), key_variable="UNSET_KEY")[0])

    assert (refusal.kind, refusal.is_attempt) == (kind, is_attempt)
    assert says in refusal.message
    assert "\n" not in refusal.message
    assert "endpoint writer at" in refusal.message


def test_no_answer_in_time_is_a_timeout_that_may_have_cost(endpoint: Endpoint) -> None:
    endpoint.script.faults = {"hang": 1.0}

    refusal = refusal_of(ask(endpoint.url, make_request(), timeout_s=0.2)[0])

    assert refusal.kind == "timeout"
    assert refusal.may_cost
    assert "0.2 s" in refusal.message


def test_nobody_there_is_no_attempt_of_the_request() -> None:
    refusal = refusal_of(ask("http://127.0.0.1:9/v1", make_request())[0])

    assert refusal.kind == "unreachable"
    assert not refusal.is_attempt
    assert not refusal.may_cost


@pytest.mark.parametrize("fault", ["null", "empty"])
def test_an_answer_without_text_is_an_answer(endpoint: Endpoint, fault: str) -> None:
    """It was paid for; the gates count it."""
    endpoint.script.faults = {fault: 1.0}

    assert answer_of(ask(endpoint.url, make_request())[0]).text == ""


def test_a_cut_answer_says_so(endpoint: Endpoint) -> None:
    endpoint.script.faults = {"length": 1.0}

    assert answer_of(ask(endpoint.url, make_request())[0]).finish_reason == "length"


@pytest.mark.parametrize("lie", ["missing", "negative", "absurd", "text", "nan", "low"])
def test_usage_that_cannot_be_true_is_estimated_and_flagged(endpoint: Endpoint, lie: str) -> None:
    endpoint.script.faults = {f"usage_{lie}": 1.0}

    answer = answer_of(ask(endpoint.url, make_request(), price={"input": 1.0, "output": 1.0})[0])

    assert answer.is_estimated
    assert 0 < answer.prompt_tokens < 50
    assert answer.completion_tokens == estimate_tokens(answer.text)
    assert 0 < answer.cost < 1


def test_a_schema_is_sent_where_it_is_taken(endpoint: Endpoint) -> None:
    answer = answer_of(ask(endpoint.url, make_request(answer="topics"))[0])

    assert answer.text.startswith('{"topics": [{"name"')
    assert endpoint.calls.bodies[-1]["response_format"]["json_schema"]["name"] == "topics"


def test_a_schema_that_is_refused_is_left_out_from_then_on(endpoint: Endpoint) -> None:
    endpoint.script.schema = False
    before = endpoint.calls.total

    results = ask(endpoint.url, make_request(1, answer="topics"), make_request(2, answer="topics"))

    assert all(isinstance(result, Answer) for result in results)
    assert endpoint.calls.total - before == 3  # refused, without it, and the second one without it at once


def test_json_schema_always_does_not_do_without(endpoint: Endpoint) -> None:
    endpoint.script.schema = False

    assert refusal_of(ask(endpoint.url, make_request(answer="topics"), json_schema="always")[0]).kind == "request"


def test_json_schema_never_sends_none(endpoint: Endpoint) -> None:
    ask(endpoint.url, make_request(answer="topics"), json_schema="never")

    assert "response_format" not in endpoint.calls.bodies[-1]


def test_an_overlong_prompt_is_not_mistaken_for_an_unknown_schema(endpoint: Endpoint) -> None:
    endpoint.script.faults = {"overlong": 1.0}
    before = endpoint.calls.total

    refusal = refusal_of(ask(endpoint.url, make_request(answer="topics"))[0])

    assert refusal.is_sure
    assert endpoint.calls.total - before == 1


def test_an_endpoint_that_wants_max_completion_tokens_gets_them(endpoint: Endpoint) -> None:
    endpoint.script.old_max_tokens = False

    results = ask(endpoint.url, make_request(1), make_request(2, answer="topics"))

    assert all(isinstance(result, Answer) for result in results)
    assert endpoint.calls.bodies[-1]["max_completion_tokens"] == 200
    assert "max_tokens" not in endpoint.calls.bodies[-1]


def test_the_key_comes_from_the_named_variable_and_is_sent(endpoint: Endpoint, monkeypatch: Any) -> None:
    monkeypatch.setenv("WRITER_KEY", f" {KEY}\n")
    endpoint.script.key = KEY

    assert isinstance(ask(endpoint.url, make_request(), key_variable="WRITER_KEY")[0], Answer)


def test_without_a_key_none_is_sent_whatever_else_is_set(endpoint: Endpoint, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    ask(endpoint.url, make_request(), key_variable="UNSET_KEY")

    assert "authorization" not in endpoint.calls.headers


def test_a_wrong_key_names_its_variable_and_shows_up_nowhere(
    endpoint: Endpoint, monkeypatch: Any, caplog: Any, capfd: Any
) -> None:
    monkeypatch.setenv("WRITER_KEY", KEY)
    endpoint.script.key = "another"
    caplog.set_level(logging.DEBUG)

    refusal = refusal_of(ask(endpoint.url, make_request(), key_variable="WRITER_KEY")[0])

    assert refusal.kind == "fatal"
    assert "the key in WRITER_KEY is not accepted" in refusal.message
    shown = capfd.readouterr()
    assert not any(KEY in text for text in (repr(refusal), caplog.text, shown.out, shown.err))


def test_an_endpoint_that_repeats_the_key_does_not_get_it_into_a_message(endpoint: Endpoint, monkeypatch: Any) -> None:
    monkeypatch.setenv("WRITER_KEY", KEY)
    client = Client(
        "writer", EndpointConfig(url=endpoint.url, model=f"m-{KEY}", key_variable="WRITER_KEY"), endpoint.url
    )

    body = '{"error": {"message": "Incorrect API key provided: ' + KEY + '"}}'
    refusal = refusal_of(client.read(make_request(), 401, {}, body))

    assert KEY not in refusal.message
    assert "***" in refusal.message
    assert KEY not in repr(client)


@pytest.mark.parametrize(
    ("url", "says"),
    [("localhost:8000/v1", "no address"), ("ftp://x/v1", "no address"), ("https://me:secret@host/v1", "leave it out")],
)
def test_what_is_no_address_is_refused(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        Client("writer", EndpointConfig(url=url, model="m"), url)
    assert "secret" not in str(caught.value)


def test_a_key_that_is_none_is_refused_without_showing_it(monkeypatch: Any) -> None:
    monkeypatch.setenv("WRITER_KEY", "sk-\nsecret")
    with pytest.raises(ConfigError, match="WRITER_KEY") as caught:
        Client("writer", EndpointConfig(url="http://x/v1", model="m", key_variable="WRITER_KEY"), "http://x/v1")
    assert "secret" not in str(caught.value)


def test_extra_body_may_not_change_what_the_budget_counts_on() -> None:
    with pytest.raises(ConfigError, match="max_tokens"):
        Client("writer", EndpointConfig(url="http://x/v1", model="m", extra_body={"max_tokens": 9}), "http://x/v1")


def test_half_a_character_in_a_prompt_fails_that_prompt_alone(endpoint: Endpoint) -> None:
    refusal = refusal_of(ask(endpoint.url, make_request(prompt="\ud800"))[0])

    assert refusal.kind == "request"
    assert refusal.is_sure


def test_half_a_character_in_an_answer_is_made_storable() -> None:
    client = Client("writer", EndpointConfig(url="http://x/v1", model="m"), "http://x/v1")
    body = '{"choices": [{"message": {"content": "a\\ud800b\\u0000c"}, "finish_reason": "stop"}]}'

    assert answer_of(client.read(make_request(), 200, {}, body)).text == "a?bc"


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "usage", "error", "code", "message", "finish_reason", "model"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(st.one_of(JSON.map(lambda value: __import__("json").dumps(value)), st.text()), st.integers(200, 599))
def test_any_response_is_an_answer_or_a_refusal_of_one_line(body: str, status: int) -> None:
    client = Client("writer", EndpointConfig(url="http://x/v1", model="m"), "http://x/v1")

    result = client.read(make_request(), status, {"retry-after": body[:10]}, body)

    assert isinstance(result, Answer) or "\n" not in result.message


@settings(deadline=None)
@given(st.text(), st.one_of(JSON, st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens"]), JSON)))
def test_usage_is_always_within_what_is_possible(text: str, said: Any) -> None:
    request = Request(endpoint="e", model="m", messages=(ChatMessage(role="user", content=text),), max_tokens=50)

    usage = check_usage(said, request, text, "stop")

    assert 0 <= usage.prompt_tokens <= most_prompt_tokens(request)
    assert 0 <= usage.completion_tokens <= 50


def test_retry_after_is_read_in_seconds_milliseconds_and_as_a_date() -> None:
    now = time.time()
    date = email.utils.formatdate(now + 30, usegmt=True)

    assert retry_after_s({"retry-after": "2.5"}) == 2.5
    assert retry_after_s({"retry-after-ms": "250", "retry-after": "1"}) == 0.25
    assert 28 < (retry_after_s({"retry-after": date}, now) or 0) <= 30
    assert retry_after_s({"retry-after": email.utils.formatdate(now - 99, usegmt=True)}, now) == 0


@settings(deadline=None)
@given(st.text())
def test_a_retry_after_of_any_text_is_a_sane_wait_or_none(text: str) -> None:
    wait_s = retry_after_s({"retry-after": text})

    assert wait_s is None or 0 <= wait_s <= LONGEST_RETRY_AFTER_S
