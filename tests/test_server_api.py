"""The server with OpenAI's own client, with curl, over the real engine: every field, whole and streamed."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from server_helpers import ASK, MODEL, NAMES, Served, events, make_engine, serving
from ultrafuser.chat.messages import Message
from ultrafuser.engine.requests import GenerationRequest
from ultrafuser.generation import SamplingParams

QUESTION: Any = [{"role": "user", "content": "hi"}]
GREEDY: Any = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(make_engine()) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def engine_text(served: Served, params: SamplingParams, **more: Any) -> str:
    """What the engine itself answers, without the server."""
    import queue

    events: queue.Queue[Any] = queue.Queue()
    rows = served.engine.encode_conversation((Message("user", "hi"),))
    served.engine.submit(GenerationRequest(rows, params, **more), events.put)
    text = ""
    while True:
        event = events.get(timeout=20)
        text += "".join(piece.text for piece in event.pieces)
        if event.finish_reason:
            return text


def test_a_chat_answer_is_the_engines(served: Served, client: openai.OpenAI):
    reply = client.chat.completions.create(**GREEDY)

    assert reply.choices[0].message.content == engine_text(served, SamplingParams(max_tokens=12))
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.model == MODEL
    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    longest = max(len(row) for row in served.engine.encode_conversation((Message("user", "hi"),)))
    assert reply.usage.prompt_tokens == longest


def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI):
    whole = client.chat.completions.create(**GREEDY)

    chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))

    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_without_include_usage_no_chunk_is_without_choices(client: openai.OpenAI):
    assert all(chunk.choices for chunk in client.chat.completions.create(**GREEDY, stream=True))


def test_a_seed_repeats_an_answer_and_another_seed_does_not(client: openai.OpenAI):
    ask = GREEDY | {"temperature": 1.5, "max_tokens": 24}
    first, again, other = (client.chat.completions.create(**ask, seed=seed) for seed in (7, 7, 8))

    assert first.choices[0].message.content == again.choices[0].message.content
    assert first.choices[0].message.content != other.choices[0].message.content


def test_the_default_temperature_is_one(served: Served):
    drawn = {served.ask(max_tokens=8, seed=seed).json()["choices"][0]["message"]["content"] for seed in range(4)}

    assert len(drawn) > 1


def test_n_answers_have_seeds_of_their_own(client: openai.OpenAI):
    ask = GREEDY | {"temperature": 1.5, "max_tokens": 24}
    reply = client.chat.completions.create(**ask, n=3, seed=1)
    streamed: dict[int, str] = {}
    for chunk in client.chat.completions.create(**ask, n=3, seed=1, stream=True):
        choice = chunk.choices[0]
        streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")

    texts = [choice.message.content for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert streamed == dict(enumerate(texts))


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(client: openai.OpenAI):
    whole = client.chat.completions.create(**GREEDY | {"max_tokens": 24}).choices[0].message.content
    assert whole is not None
    stop = whole[5:7]

    reply = client.chat.completions.create(**GREEDY | {"max_tokens": 24}, stop=[stop, "never there"])

    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_max_tokens_has_two_names(client: openai.OpenAI):
    ask = {name: value for name, value in GREEDY.items() if name != "max_tokens"}
    old = client.chat.completions.create(**ask, max_tokens=3, extra_body={"ignore_eos": True})
    new = client.chat.completions.create(**ask, max_completion_tokens=3, extra_body={"ignore_eos": True})

    assert old.choices[0].message.content == new.choices[0].message.content
    assert new.choices[0].finish_reason == "length"
    assert new.usage is not None
    assert new.usage.completion_tokens == 3


def test_every_sampling_field_reaches_the_engine(served: Served):
    """Greedy with a field set is what the engine says with that parameter set."""
    fields: dict[str, tuple[Any, Any]] = {
        "presence_penalty": (1.5, 1.5),
        "frequency_penalty": (1.5, 1.5),
        "repetition_penalty": (1.8, 1.8),
        "logit_bias": ({"70": 100}, ((70, 100.0),)),
        "min_tokens": (9, 9),
        "stop_token_ids": ([70, 71, 72], (70, 71, 72)),
    }
    for name, (sent, meant) in fields.items():
        reply = served.ask(temperature=0, max_tokens=12, **{name: sent}).json()

        expected = engine_text(served, SamplingParams(max_tokens=12, **{name: meant}))
        assert reply["choices"][0]["message"]["content"] == expected, name


@pytest.mark.parametrize(("name", "value"), [("top_p", 0.01), ("top_k", 1), ("min_p", 1.0)])
def test_cuts_leave_the_likeliest_token(served: Served, name: str, value: float):
    greedy = served.ask(temperature=0, max_tokens=12).json()["choices"][0]["message"]

    assert served.ask(temperature=2, max_tokens=12, **{name: value}).json()["choices"][0]["message"] == greedy


def test_log_probabilities_of_a_chat(client: openai.OpenAI):
    reply = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3)
    streamed = list(client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3, stream=True))

    log_probs = reply.choices[0].logprobs
    assert log_probs is not None
    assert log_probs.content is not None
    assert reply.usage is not None
    assert len(log_probs.content) == reply.usage.completion_tokens
    for token in log_probs.content:
        assert token.logprob <= 0
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].token == token.token  # greedy
        assert len(token.top_logprobs) == 3
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    tokens = [token for part in parts if part is not None for token in part.content or []]
    assert [token.bytes for token in tokens] == [token.bytes for token in log_probs.content]


def test_weights_are_told_on_request_alone(client: openai.OpenAI):
    plain = client.chat.completions.create(**GREEDY)
    told = client.chat.completions.create(**GREEDY, extra_body={"fusion": {"weights": True}})

    assert "fusion" not in plain.choices[0].model_dump()
    assert plain.usage is not None
    assert "fusion_mean" not in plain.usage.model_dump()
    tokens = told.choices[0].model_dump()["fusion"]
    assert told.usage is not None
    assert len(tokens) == told.usage.completion_tokens
    assert "".join(token["text"] for token in tokens) == told.choices[0].message.content
    for token in tokens:
        assert len(token["weights"]) == len(NAMES)
        assert sum(token["weights"]) == pytest.approx(1, abs=1e-4)
    means = told.usage.model_dump()["fusion_mean"]
    assert list(means) == NAMES
    assert means["text"] == pytest.approx(sum(token["weights"][0] for token in tokens) / len(tokens), abs=1e-5)


def test_streamed_weights_come_with_their_tokens(client: openai.OpenAI):
    whole = client.chat.completions.create(**GREEDY, extra_body={"fusion": {"weights": True}})
    chunks = list(
        client.chat.completions.create(
            **GREEDY, stream=True, stream_options={"include_usage": True}, extra_body={"fusion": {"weights": True}}
        )
    )

    tokens = [token for chunk in chunks[:-1] for token in chunk.choices[0].model_dump().get("fusion") or []]
    assert tokens == whole.choices[0].model_dump()["fusion"]
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.model_dump() == whole.usage.model_dump()


def test_specialists_can_be_left_out_and_weighed_by_hand(served: Served):
    def ask(**fusion: Any) -> Any:
        return served.ask(temperature=0, max_tokens=8, fusion={"weights": True, **fusion}).json()["choices"][0]

    without, by_hand, alone = ask(without=["code"]), ask(override={"text": 1, "math": 3}), ask(override={"math": 1.0})

    assert all(token["weights"][1] == 0 for token in without["fusion"])
    assert all(token["weights"] == [0.25, 0, 0.75] for token in by_hand["fusion"])
    assert all(token["weights"] == [0, 0, 1] for token in alone["fusion"])
    expected = engine_text(served, SamplingParams(max_tokens=8), weights={"math": 1.0})
    assert alone["message"]["content"] == expected


@pytest.mark.parametrize(
    "fusion",
    [
        {"without": ["nobody"]},
        {"without": NAMES},
        {"override": {"nobody": 1}},
        {"override": {"text": -1}},
        {"override": {}},
        {"override": {"text": 0}},
        {"weights": 1},
        {"solo": "text"},
        True,
    ],
    ids=str,
)
def test_nonsense_about_the_fusion_is_refused(served: Served, fusion: Any):
    response = served.ask(max_tokens=2, fusion=fusion)

    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_completions_take_text_ids_and_batches_of_them(served: Served, client: openai.OpenAI):
    ids = [list(served.engine.encode_text(text)[0]) for text in ("ab", "cd")]
    ask: Any = {"model": MODEL, "temperature": 0, "max_tokens": 6}

    texts = [
        [choice.text for choice in client.completions.create(**ask, prompt=prompt).choices]
        for prompt in ("ab", "cd", ids[0], ["ab", "cd"], ids)
    ]

    assert texts[2] == texts[0]
    assert texts[3] == texts[4] == [*texts[0], *texts[1]]


def test_a_batch_with_n_is_ordered_by_prompt(client: openai.OpenAI):
    ask: Any = {"model": MODEL, "temperature": 1.5, "max_tokens": 16, "seed": 3}
    batch = client.completions.create(**ask, prompt=["ab", "cd"], n=2, extra_body={"best_of": 2})
    alone = client.completions.create(**ask, prompt="cd", n=2)

    assert [choice.index for choice in batch.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in batch.choices[2:]] == [choice.text for choice in alone.choices]


def test_completions_have_sixteen_tokens_by_default(client: openai.OpenAI):
    reply = client.completions.create(model=MODEL, prompt="ab", extra_body={"ignore_eos": True})

    assert reply.usage is not None
    assert reply.usage.completion_tokens == 16


def test_echo_scores_the_prompt(client: openai.OpenAI):
    reply = client.completions.create(model=MODEL, prompt="abc", max_tokens=2, temperature=0, echo=True, logprobs=2)

    choice = reply.choices[0]
    log_probs = choice.logprobs
    assert choice.text.startswith("abc")
    assert log_probs is not None
    assert log_probs.tokens is not None
    assert log_probs.token_logprobs is not None
    assert log_probs.top_logprobs is not None
    assert log_probs.text_offset is not None
    assert log_probs.tokens[:3] == ["a", "b", "c"]
    assert log_probs.token_logprobs[0] is None
    assert all(value is not None and value < 0 for value in log_probs.token_logprobs[1:])
    assert log_probs.text_offset[:4] == [0, 1, 2, 3]
    for token, value, top in zip(log_probs.tokens, log_probs.token_logprobs, log_probs.top_logprobs, strict=True):
        if value is not None:
            assert top[token] == value


def test_a_streamed_completion_echoes_and_adds_up(client: openai.OpenAI):
    ask: Any = {"model": MODEL, "prompt": ["ab", "cd"], "temperature": 0, "max_tokens": 6, "echo": True}
    whole = client.completions.create(**ask)

    parts = {0: "", 1: ""}
    for chunk in client.completions.create(**ask, stream=True):
        parts[chunk.choices[0].index] += chunk.choices[0].text

    assert parts == {choice.index: choice.text for choice in whole.choices}


def test_models_tell_specialists_and_context(client: openai.OpenAI):
    (model,) = client.models.list().data

    assert model.id == MODEL
    assert model.model_dump()["fusion"] == {"specialists": NAMES, "max_context": 512}


def test_tokenize_and_back(served: Served):
    tokens = served.client.post("/tokenize", json={"prompt": "grüße"}).json()
    back = served.client.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
    rows = served.client.post("/tokenize", json={"messages": QUESTION}).json()

    assert back == {"prompt": "grüße"}
    assert tokens["count"] == len(tokens["tokens"])
    assert list(rows["specialists"]) == NAMES
    assert [tuple(row) for row in rows["specialists"].values()] == list(
        served.engine.encode_conversation((Message("user", "hi"),))
    )


def test_facts_about_the_server(served: Served):
    import ultrafuser

    served.ask(max_tokens=2, temperature=0, ignore_eos=True)
    assert served.is_idle()
    figures = served.client.get("/metrics").text

    assert served.client.get("/health").json() == {"status": "ok"}
    assert served.client.get("/version").json() == {"version": ultrafuser.__version__}
    for name in (
        "num_requests_running 0",
        "num_requests_waiting 0",
        "kv_cache_usage_perc",
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_count",
        "prompt_tokens_total",
        "generation_tokens_total",
        'request_success_total{finished_reason="length"}',
        "spec_decode_num_accepted_tokens_total",
        'gate_weight_count{specialist="math"}',
        "log_lines_dropped_total",
    ):
        assert f"ultrafuser:{name}" in figures, name
    assert 'route="/v1/chat/completions",status="200"' in figures


def test_every_response_has_a_number_and_a_clients_own_is_kept(served: Served):
    own = served.client.get("/version", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"]
    bad = served.client.get("/version", headers={"X-Request-Id": "a b"}).headers["X-Request-Id"]
    fresh = [served.client.get("/version").headers["X-Request-Id"] for _ in range(2)]

    assert own == "abc-1"
    assert " " not in bad
    assert len({*fresh, own, bad}) == 4


def test_curl_can_ask_and_stream(served: Served):
    def curl(body: Any) -> str:
        command = [
            "curl",
            "-sS",
            "-N",
            "--fail-with-body",
            f"{served.url}/v1/chat/completions",
            "--json",
            json.dumps(body),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    whole = json.loads(curl(GREEDY))["choices"][0]["message"]["content"]
    lines = curl(GREEDY | {"stream": True}).split("\n\n")

    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole


def test_null_is_as_good_as_left_out(served: Served):
    fields = ["temperature", "top_p", "stop", "seed", "n", "logprobs", "stream", "stream_options", "user", "fusion"]

    assert served.ask(max_tokens=1, **dict.fromkeys(fields)).status_code == 200


def test_parts_of_text_are_joined(served: Served):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    one, many = (
        served.client.post("/tokenize", json={"messages": [{"role": "user", "content": content}]}).json()
        for content in ("a\nb", parts)
    )

    assert one == many


def test_usage_can_be_streamed_with_plain_completions(served: Served):
    body = {"model": MODEL, "prompt": "ab", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3}

    last = events(served.client.post("/v1/completions", json=body))[-1]

    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]


def test_the_page_is_served_with_a_strict_policy(served: Served):
    page = served.client.get("/")

    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert served.client.get("/page/script.js").headers["content-type"].startswith("text/javascript")
    assert served.client.get("/page/style.css").headers["content-type"].startswith("text/css")


def test_a_question_that_is_not_one_is_refused(served: Served):
    response = served.ask(messages=[*ASK["messages"], {"role": "assistant", "content": "yes"}])

    assert response.status_code == 400
    assert "user message" in response.json()["error"]["message"]
