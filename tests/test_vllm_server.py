"""`vllm serve` of an exported model: the real openai client, our own evaluation and our synthesis get its answers."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from helpers import PAPER_TEMPLATES, make_tokenizer
from ultrafuser.chat.messages import Message
from ultrafuser.cli.main import app
from ultrafuser.data.records import read_records
from ultrafuser.evaluation.run import EvaluationOptions, evaluate_models
from ultrafuser.export.shared import save_shared, shared_template
from ultrafuser.generation import SamplingParams
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.synthesis.asking.endpoints.client import Client
from ultrafuser.synthesis.domain import SHARED
from ultrafuser.synthesis.load import load_synthesis
from ultrafuser.synthesis.node import Answer, ChatMessage, Request
from ultrafuser.synthesis.recipe import EndpointConfig
from ultrafuser.synthesis.storage.store import Store
from ultrafuser.vllm_plugin.requests import HOW_TO_START, write_prompts
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
    with install().serve(folder, *SMALL, "--served-model-name", "tiny", "--enable-prefix-caching", folder=root) as url:
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


def test_a_server_that_was_not_started_for_own_prompts_refuses_them(served: Served):
    """Rather than have all read the longest prompt, which would look like an answer."""
    own = {"vllm_xargs": write_prompts([[5, 6, 7]] * 3)}

    with pytest.raises(openai.BadRequestError) as error:
        served.client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=1, extra_body=own)

    assert HOW_TO_START in error.value.body["message"]


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


def metric(served: Served, name: str) -> float:
    """A counter of the server, over all its labels."""
    text = openai.DefaultHttpxClient().get(served.url.removesuffix("/v1") + "/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def write_synthesis(folder: Path, url: str) -> Path:
    """A recipe for a model that writes nonsense: short prompts, no gates, a bias towards short words, in full lists."""
    prompts = {
        "meta_topics": "{{count}} areas. {{avoid}} {{format}}",
        "sub_topics": "{{topic}}: {{count}} topics. {{avoid}} {{format}}",
        "instructions": "{{topic}}: {{count}} tasks. {{avoid}} {{format}}",
        "responses": "Answer.",
    }
    domain = folder / "tiny"
    domain.mkdir()
    for name, text in prompts.items():
        (domain / f"{name}.md").write_text(text + "\n")
    defaults = yaml.safe_load((SHARED / "defaults.yaml").read_text())
    settings: dict[str, Any] = {"title": "x", "about": "x", "meta_topics": 1, "sub_topics": 2, "records": 4}
    settings |= {"margin": 1.0, "complicated": 0.0, "shares": {"instructions": 1.0, "strong": 0.0, "weak": 0.0}}
    settings |= {"max_avoid": 2, "max_avoid_characters": 20, "per_request": {"meta_topics": 1, "sub_topics": 2}}
    settings["gates"] = {stage: dict.fromkeys(gates) for stage, gates in defaults["gates"].items()}
    (domain / "domain.yaml").write_text(yaml.safe_dump(settings))
    biases = dict.fromkeys("abcdefgh", 8) | {'"': 9} | dict.fromkeys(" \n\r\t", -6)
    biases |= {"{": 5, "]": 1}  # the schema takes a list of nothing, too
    tokenizer = make_tokenizer()
    bias = {str(tokenizer(letter, add_special_tokens=False)["input_ids"][0]): by for letter, by in biases.items()}
    tree = {
        "name": "tiny",
        "folder": str(folder / "run"),
        "endpoints": {"vllm": {"url": url, "model": "tiny", "extra_body": {"logit_bias": bias}}},
        "stages": {"default": {"max_tokens": 220}, "responses": {"max_tokens": 8}},
        "domains": {"tiny": {"folder": str(domain)}},
        "export": {"validation_fraction": 0.5},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return folder / "tiny.yaml"


def test_a_whole_synthesis_runs_against_the_server(served: Served, tmp_path: Path):
    """Plan, ask with a JSON schema, read, answer, export; what the server counted is what was counted here."""
    recipe = write_synthesis(tmp_path, served.url)

    def command(*arguments: str | Path) -> str:
        result = CliRunner().invoke(app, ["synthesize", *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    counters = ("vllm:request_success_total", "vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    before = [metric(served, name) for name in counters]
    assert "tiny: 4 answers kept" in command(recipe)
    used = [metric(served, name) - start for name, start in zip(counters, before, strict=True)]

    with Store.open(load_synthesis(recipe), read_only=True) as store:
        spent, progress = store.spent(), store.progress()
    assert {stage.stage for stage in progress} == {"meta_topics", "sub_topics", "instructions", "responses"}
    assert sum(stage.nodes["answered"] for stage in progress) == used[0]
    assert (spent.prompt_tokens, spent.completion_tokens) == (used[1], used[2])

    assert "0 requests in" in command("run", recipe)
    assert metric(served, counters[0]) == before[0] + used[0]
    command("export", recipe, "--to", tmp_path / "set")
    files = sorted((tmp_path / "set" / "data").glob("*.jsonl"))
    records = [record for file in files for record in read_records(file, domain_field="domain")]
    assert len(records) == 4
    assert all(record.messages[-1].content for record in records)


def test_the_question_is_what_the_specialists_read(served: Served):
    """One row for all: what the server renders is what each specialist was given by the export."""
    rows = served.generator.encoder.encode_prompt((Message("user", "hi"),))

    assert len(set(rows)) == 1
