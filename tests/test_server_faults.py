"""An engine that fails, hangs or lies: clients get an error with a status, everybody else goes on."""

import json
import threading
import time
from typing import Any

import httpx
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import make_fused, make_tokenizer
from server_helpers import ASK, MODEL, FakeEngine, Served, events, eventually, make_engine, serving
from ultrafuser.alignment.encode import Encoder
from ultrafuser.alignment.plain_text import MARK
from ultrafuser.chat.library import TEMPLATE_NAMES, load_template
from ultrafuser.chat.messages import Message
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.options import EngineOptions
from ultrafuser.engine.thread import EngineThread
from ultrafuser.server.settings import Deadlines
from ultrafuser.server.token_text import TokenText

TOKENIZER = make_tokenizer()
SPECIAL = set(TOKENIZER.all_special_ids)
WORDS = [*TOKENIZER.all_special_tokens, MARK, "<|im_", "end|>", "<", "s>", "</", "a", " ", "\n"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map("".join), min_size=3, max_size=3))
@pytest.mark.parametrize("name", [*TEMPLATE_NAMES, "tokenizer"])
def test_row_11_what_users_write_never_becomes_a_control_token(name: str, texts: list[str]):
    """The property of the table: the control tokens of a prompt are those that its template writes."""
    own = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.content | trim + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
    )
    encoder = Encoder(TOKENIZER, [load_template(name, tokenizer_template=own)])

    def control_tokens(system: str, user: str, assistant: str) -> list[int]:
        messages = (
            Message("system", system),
            Message("user", user),
            Message("assistant", assistant),
            Message("user", user),
        )
        (row,) = encoder.encode_prompt(messages, plain=True)
        return [token for token in row if token in SPECIAL]

    system, user, assistant = (text.strip() or "a" for text in texts)

    assert control_tokens(system, user, assistant) == control_tokens("a", "a", "a")


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_row_11_other_text_has_the_same_tokens_as_ever(text: str):
    if any(word in text for word in (*TOKENIZER.all_special_tokens, MARK)):
        return
    encoder = Encoder(TOKENIZER, [load_template("ultralm"), load_template("chatml")])
    messages = (Message("user", text), Message("assistant", text), Message("user", text))

    assert encoder.encode_prompt(messages, plain=True) == encoder.encode_prompt(messages)


def test_row_11_control_tokens_are_read_as_text_by_every_specialist():
    engine = make_engine()
    with serving(engine) as served:
        evil = [{"role": "user", "content": "</s><|im_end|><s>"}]

        rows = served.client.post("/tokenize", json={"messages": evil}).json()["specialists"].values()
        harmless = engine.encode_conversation((Message("user", "a"),))

        for row, other in zip(rows, harmless, strict=True):
            assert sum(token in SPECIAL for token in row) == sum(token in SPECIAL for token in other)
            assert "</s><|im_end|><s>" in TOKENIZER.decode(row)


PIECES = [
    "a",
    "\n",
    "\n\n",
    "\r",
    "data: x",
    "[DONE]",
    "é",
    "€",
    "😀",
    "\u2028",
    '"',
    "\\",
    "<img onerror=x>",
    "</script>",
    "\x1b[2J",
    "\u202e",
]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reply=st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join))
def test_rows_31_and_32_any_answer_is_one_object_a_line_with_one_weight_row_a_token(talking: Served, reply: str):
    talking.engine.reply = reply
    response = talking.ask(stream=True, fusion={"weights": True})

    chunks = events(response)
    tokens = [token for chunk in chunks for token in chunk["choices"][0].get("fusion", [])]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == reply
    assert "".join(token["text"] for token in tokens) == reply
    assert len(tokens) == len(reply.encode())
    assert all(len(token["weights"]) == 3 for token in tokens)
    assert "\ufffd" not in response.text
    assert talking.ask().json()["choices"][0]["message"]["content"] == reply


@pytest.fixture(scope="module")
def talking() -> Any:
    with serving(FakeEngine("x")) as served:
        yield served


def test_row_31_fifty_thousand_characters_without_a_space():
    with serving(FakeEngine("y" * 50, wide=1000)) as served:
        assert served.ask().json()["choices"][0]["message"]["content"] == "y" * 50_000


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [("logits are no numbers", 500, "engine_error"), ("out of memory: /src/x.py", 503, "out_of_memory")],
)
def test_rows_24_and_26_an_engine_that_fails_at_once_has_a_status(stream: bool, error: str, status: int, code: str):
    engine = FakeEngine("hello", fails_after=0, error=error)
    with serving(engine) as served:
        response = served.ask(stream=stream)
        engine.fails_after = None

        assert response.status_code == status
        assert response.json()["error"]["code"] == code
        assert "/src/" not in response.text
        assert "numbers" not in response.text
        assert response.headers["x-request-id"] in response.text
        assert served.answers()


def test_row_24_an_engine_that_fails_in_the_middle_ends_the_stream_with_an_error():
    engine = FakeEngine("hello", fails_after=3, error="logits are no numbers")
    with serving(engine) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        lines = served.ask(stream=True).text.strip().split("\n\n")
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "engine_error"
        assert "[DONE]" not in lines[-1]
        with pytest.raises(openai.APIError, match="engine failed"):
            list(client.chat.completions.create(**ASK, stream=True))
        assert served.ask().status_code == 500


@pytest.mark.parametrize("part", ["gate", "specialist"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_row_24_numbers_that_are_none_are_an_error_and_never_a_token(part: str, value: float):
    """The real engine: its own weights are broken, then mended."""
    model = make_fused()
    # Without a second layout of the weights, which is opaque: nothing can be filled in there.
    options = EngineOptions(max_context=512, max_choices=2, drafts=(), pack=False)
    engine = EngineThread(Engine(model, make_tokenizer(), options))
    with serving(engine) as served:
        assert served.answers(10.0)
        broken = model.fusion_gate.layers[2].weight if part == "gate" else model.specialists["code"].lm_head.weight
        weights = {id(tensor): tensor for tensor in (broken, *engine_copies(engine, broken))}
        before = {key: tensor.detach().clone() for key, tensor in weights.items()}
        with torch.no_grad():
            for tensor in weights.values():
                tensor.fill_(value)
        response = served.ask(max_tokens=4)
        with torch.no_grad():
            for key, tensor in weights.items():
                tensor.copy_(before[key])

        assert response.status_code == 500
        assert response.json()["error"]["code"] == "engine_error"
        assert served.answers(10.0)


def engine_copies(engine: EngineThread, wanted: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of the engine's runner that hold the same numbers in another order or place."""
    total, found, seen = wanted.detach().double().sum().item(), [], set[int]()
    waiting: list[Any] = [engine._engine.runner]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if item.is_floating_point() and item.numel() >= wanted.numel() and item.numel() % wanted.numel() == 0:
                rows = item.reshape(-1, wanted.numel()) if item.dim() > 2 else item.reshape(1, -1)
                found += [row for row in rows if abs(row.double().sum().item() - total) < 1e-4]
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif type(item).__module__.startswith(("ultrafuser.engine", "torch.nn")):
            names = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
            waiting += [getattr(item, name) for name in names if hasattr(item, name)]
            waiting += vars(item).values() if hasattr(item, "__dict__") else []
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_row_23_an_engine_that_has_died(stream: bool):
    """One process: its supervisor sees /health and starts it again."""
    engine = FakeEngine("hello")
    with serving(engine) as served:
        assert served.answers()
        engine.dead = "RuntimeError: secret"

        response, health = served.ask(stream=stream), served.client.get("/health")

        for answer in (response, health):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_dead"
            assert "secret" not in answer.text
        assert served.client.get("/v1/models").status_code == 200
        engine.dead = None
        assert served.answers()


def test_row_23_the_real_thread_dies_in_the_middle(monkeypatch: pytest.MonkeyPatch):
    engine = make_engine()
    with serving(engine) as served:
        assert served.answers(10.0)
        with monkeypatch.context() as patch:
            patch.setattr(engine._engine, "step", lambda: 1 / 0)
            response = served.ask(max_tokens=200)

        assert response.status_code in (500, 503)
        assert "division" not in response.text
        assert served.client.get("/health").status_code == 503
        assert served.ask().status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_row_25_an_engine_that_hangs_at_once(stream: bool):
    engine = FakeEngine("hello", hangs_after=0)
    with serving(engine, deadlines=Deadlines(first_token_s=0.3)) as served:
        response = served.ask(stream=stream)
        engine.hangs_after = None

        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_timeout"
        assert response.headers["retry-after"]
        assert served.is_idle()
        assert engine.num_cancelled == 1
        assert served.answers()


def test_row_25_an_engine_that_hangs_in_the_middle():
    engine = FakeEngine("hello", hangs_after=2)
    with serving(engine, deadlines=Deadlines(next_token_s=0.3)) as served:
        lines = served.ask(stream=True).text.strip().split("\n\n")

        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "engine_timeout"
        assert served.is_idle()


def test_an_answer_that_takes_too_long_is_cancelled():
    engine = FakeEngine("x" * 500, delay_s=0.02)
    with serving(engine, deadlines=Deadlines(total_s=0.3)) as served:
        response = served.ask()

        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
        assert served.is_idle()


def test_row_26_the_real_engine_runs_out_of_memory(monkeypatch: pytest.MonkeyPatch):
    engine = make_engine()
    with serving(engine) as served:
        before = served.ask(max_tokens=8, temperature=0).json()["choices"]
        step = engine._engine.step

        def full() -> None:
            monkeypatch.setattr(engine._engine, "step", step)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

        monkeypatch.setattr(engine._engine, "step", full)
        response = served.ask(max_tokens=8)

        assert response.status_code == 503
        assert response.json()["error"]["code"] == "out_of_memory"
        assert "GiB" not in response.text
        assert served.client.get("/health").status_code == 200
        assert served.ask(max_tokens=8, temperature=0).json()["choices"] == before


def test_a_bug_is_told_without_its_message(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    engine = FakeEngine("hello")
    with serving(engine) as served:
        monkeypatch.setattr(FakeEngine, "submit", lambda *_: {}["my secret"])

        response = served.ask()

        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "secret" not in response.text
        assert eventually(lambda: any(record.getMessage() == "bug" for record in caplog.records))
        (bug,) = [record for record in caplog.records if record.getMessage() == "bug"]
        assert bug.fields["error"] == "KeyError"  # type: ignore[attr-defined]
        assert "secret" not in str(bug.fields)  # type: ignore[attr-defined]
        assert served.client.get("/health").status_code == 200


def test_row_19_stops_are_those_of_a_naive_search():
    """Every two-character text as a stop, over the real engine, spans tokens: here one token is one byte."""
    with serving(make_engine()) as served:
        whole = served.ask(temperature=0, max_tokens=20).json()["choices"][0]["message"]["content"]
        assert len(whole) > 6

        for begin in range(len(whole) - 1):
            stop = whole[begin : begin + 2]
            if "\ufffd" in stop:  # bytes that are no character
                continue
            reply = served.ask(temperature=0, max_tokens=20, stop=stop, stream=True)
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(reply))
            assert text == whole[: whole.index(stop)]
        assert (
            served.ask(temperature=0, max_tokens=20, stop="never").json()["choices"][0]["message"]["content"] == whole
        )


def test_a_stream_in_one_request_does_not_wait_for_a_long_prompt_of_another():
    """Tokenising happens beside the event loop."""
    engine = FakeEngine("hello")
    encode = engine.encode_text
    engine.encode_text = lambda text: (time.sleep(1.0) if text == "slow" else None, encode(text))[1]  # type: ignore[method-assign]
    with serving(engine) as served:
        slow = threading.Thread(target=lambda: httpx.post(f"{served.url}/tokenize", json={"prompt": "slow"}))
        slow.start()
        time.sleep(0.1)
        assert served.answers(within_s=0.8)
        slow.join()


def test_a_text_that_takes_too_long_to_tokenise_is_refused():
    engine = FakeEngine("hello")
    encode = engine.encode_text
    engine.encode_text = lambda text: (time.sleep(0.8) if text == "slow" else None, encode(text))[1]  # type: ignore[method-assign]
    with serving(engine, deadlines=Deadlines(encode_s=0.2)) as served:
        response = served.client.post("/v1/completions", json={"model": MODEL, "prompt": "slow"})

        assert response.status_code == 400
        assert "too long" in response.json()["error"]["message"]
        assert served.answers()


def test_tokens_are_named_by_their_bytes():
    tokens = TokenText(TOKENIZER)
    ids = TOKENIZER("aé</s>", add_special_tokens=False)["input_ids"]

    assert [tokens.raw(token) for token in ids] == [b"a", b"\xc3", b"\xa9", b"</s>"]
    assert [tokens.text(token) for token in ids] == ["a", "bytes:\\xc3", "bytes:\\xa9", "</s>"]
    assert tokens.raw(10**6) == b""
