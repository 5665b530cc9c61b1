"""`vllm serve` of an exported model: the real openai client, our own evaluation and our synthesis get its answers."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import PAPER_TEMPLATES, make_tokenizer
from ultrafuser.chat.messages import Message
from ultrafuser.evaluation.run import EvaluationOptions, evaluate_models
from ultrafuser.export.shared import save_shared, shared_template
from ultrafuser.generation import SamplingParams
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.synthesis.asking.endpoints.client import Client
from ultrafuser.synthesis.node import Answer, ChatMessage, Request
from ultrafuser.synthesis.recipe import EndpointConfig
from vllm_helpers import SMALL, asking, install, make_servable

openai: Any = pytest.importorskip("openai", reason="the client of OpenAI comes with the extra 'synthesis'")
QUESTIONS = ("hi", "What is two and two?", "Write a loop.")


@dataclass(frozen=True)
class Served:
    """A running server and the same model at hand."""

    url: str
    folder: Path
    generator: FusedGenerator

    @property
    def client(self) -> Any:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    model, tokenizer = make_servable(templates=PAPER_TEMPLATES), make_tokenizer()
    folder = save_shared(model, tokenizer, shared_template(model, tokenizer, "chatml"), root / "model")
    home = install(root / "site")
    with home.serve(folder, *SMALL, "--served-model-name", "tiny", "--enable-prefix-caching", folder=root) as url:
        yield Served(url, folder, FusedGenerator.from_pretrained(str(folder), dtype=torch.float32))


def answer_of(served: Served, text: str, max_tokens: int = 12) -> str:
    return served.generator.generate([asking(text)], SamplingParams(max_tokens=max_tokens))[0].text


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_chat_is_answered_as_by_generate(served: Served, question: str):
    chat = served.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": question}], max_tokens=12, temperature=0
    )

    assert chat.choices[0].message.content == answer_of(served, question)
    (prompt, *_) = served.generator.encoder.encode_prompt(asking(question))
    assert chat.usage.prompt_tokens == len(prompt)


def test_a_stream_adds_up_to_the_answer_and_tells_the_usage(served: Served):
    stream = served.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )

    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer_of(served, "hi")
    assert chunks[-1].usage.completion_tokens > 0


def test_log_probabilities_are_the_models(served: Served):
    tokenizer = served.generator.tokenizer
    prompt = tokenizer("two and two", add_special_tokens=False)["input_ids"]

    found = served.client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=1,
        temperature=0,
        logprobs=3,
        extra_body={"return_tokens_as_token_ids": True},  # several tokens are half a letter and look the same
    ).choices[0]

    with torch.no_grad():
        row = served.generator.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert found.logprobs.token_logprobs[0] == pytest.approx(float(row.max()), abs=1e-4)
    top = sorted(found.logprobs.top_logprobs[0].values(), reverse=True)[:3]
    assert top == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_a_conversation_that_goes_on_reads_its_beginning_from_the_cache(served: Served):
    messages = [{"role": "user", "content": "x" * 200}]
    first = served.client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    again = served.client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)

    assert again.choices[0].message.content == first.choices[0].message.content
    metrics = openai.DefaultHttpxClient().get(served.url.removesuffix("/v1") + "/metrics").text
    hits = [line for line in metrics.splitlines() if line.startswith("vllm:prefix_cache_hits_total")]
    assert float(hits[0].split()[-1]) > 0


def test_our_evaluation_gets_the_same_answers_from_the_server(served: Served, tmp_path: Path):
    options = EvaluationOptions(tasks=["gsm8k"], folder=tmp_path, places={"gsm8k": "embedded"}, limit=3, max_tokens=12)

    results = evaluate_models({"local": str(served.folder), "remote": f"{served.url}#tiny"}, options)

    answers = {
        name: {item.id: item.responses for item in results.items if item.model == name} for name in ("local", "remote")
    }
    assert answers["remote"] == answers["local"]
    assert len(answers["remote"]) == 3


def test_synthesis_asks_the_server(served: Served):
    config = EndpointConfig(url=served.url, model="tiny")
    request = Request(
        endpoint="vllm",
        model="tiny",
        messages=(ChatMessage(role="user", content="hi"),),
        temperature=0.0,
        max_tokens=12,
    )

    async def ask() -> Any:
        async with Client("vllm", config, served.url) as client:
            return await client.ask(request)

    answer = asyncio.run(ask())
    assert isinstance(answer, Answer)
    assert answer.text == answer_of(served, "hi").replace("\0", "")  # which no database stores
    assert not answer.is_estimated


def test_the_question_is_what_the_specialists_read(served: Served):
    """One row for all: what the server renders is what each specialist was given by the export."""
    rows = served.generator.encoder.encode_prompt((Message("user", "hi"),))

    assert len(set(rows)) == 1
