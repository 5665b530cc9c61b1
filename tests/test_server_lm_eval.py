"""lm-eval's own API models against the server: log-likelihoods and answers are those of the model itself."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import make_fused, make_tokenizer
from server_helpers import MODEL, Served, make_engine, serving
from ultrafuser.generation import SamplingParams
from ultrafuser.model.generator import FusedGenerator

os.environ.setdefault("TQDM_DISABLE", "1")
Instance: Any = pytest.importorskip("lm_eval.api.instance").Instance
api: Any = pytest.importorskip("lm_eval.models.openai_completions")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(make_engine()) as served:
        yield served


@pytest.fixture(scope="module")
def generator() -> FusedGenerator:
    return FusedGenerator(make_fused(), make_tokenizer())


@pytest.fixture
def completions(served: Served, tmp_path: Path) -> Any:
    make_tokenizer().save_pretrained(tmp_path)
    return api.LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(tmp_path),
        model=MODEL,
        max_length=500,
        batch_size=2,
        max_retries=1,
    )


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [
        Instance(request_type=kind, doc={}, arguments=argument, idx=index) for index, argument in enumerate(arguments)
    ]


def test_log_likelihoods_are_the_models(completions: Any, generator: FusedGenerator):
    pairs = [("two and two", " is four"), ("The capital", " of France"), ("x", "y")]

    found = completions.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)

    encode = make_tokenizer()
    ids = [[tuple(encode(text, add_special_tokens=False)["input_ids"]) for text in pair] for pair in pairs]
    expected = generator.score_continuations([(prompt,) * 3 for prompt, _ in ids], [rest for _, rest in ids])
    for (log_prob, is_greedy), score in zip(found, expected, strict=True):
        assert log_prob == pytest.approx(score.log_prob, abs=1e-3)
        assert is_greedy == score.is_greedy


def test_the_greedy_answer_is_found_to_be_greedy(completions: Any, generator: FusedGenerator):
    prompt = tuple(make_tokenizer()("abc", add_special_tokens=False)["input_ids"])
    answer = generator.complete([prompt], SamplingParams(max_tokens=4))[0]
    requests = [(("abc", ""), list(prompt), list(answer.token_ids))]

    ((_, is_greedy),) = completions._loglikelihood_tokens(requests, disable_tqdm=True)

    assert is_greedy


def test_answers_are_the_models(completions: Any, generator: FusedGenerator):
    arguments = [(text, {"until": ["never"], "max_gen_toks": 8, "temperature": 0}) for text in ("ab", "cde")]

    found = completions.generate_until(instances("generate_until", *arguments), disable_tqdm=True)

    encode = make_tokenizer()
    prompts = [encode(text, add_special_tokens=False)["input_ids"] for text in ("ab", "cde")]
    expected = generator.complete(prompts, SamplingParams(max_tokens=8))
    assert found == [answer.text for answer in expected]


def test_chats_are_answered_in_each_specialists_template(served: Served, generator: FusedGenerator):
    from ultrafuser.chat.messages import Message

    chat = api.LocalChatCompletion(
        base_url=f"{served.url}/v1/chat/completions", model=MODEL, tokenized_requests=False, max_retries=1
    )
    history = chat.apply_chat_template([{"role": "user", "content": "hi"}])
    arguments = [(history, {"until": ["never"], "max_gen_toks": 8, "temperature": 0})]

    found = chat.generate_until(instances("generate_until", *arguments), disable_tqdm=True)

    expected = generator.generate([(Message("user", "hi"),)], SamplingParams(max_tokens=8))
    assert found == [answer.text for answer in expected]
