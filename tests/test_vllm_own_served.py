"""Own template per specialist, in vLLM: what `generate()` writes, each specialist reading its own prompt. Experimental.

On a CPU vLLM runs its first model runner. For the second one, whose hook is for this, see `vllm_second_runner.py`.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import PAPER_TEMPLATES, make_tokenizer
from test_vllm_tokens import save_mixed
from ultrafuser.chat.messages import Conversation, Message
from ultrafuser.generation import SamplingParams
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.vllm_plugin.requests import prompt_encoder, vllm_request
from vllm_helpers import SMALL, asking, install

openai: Any = pytest.importorskip("openai", reason="the client of OpenAI comes with the extra 'synthesis'")
NUM_TOKENS = 10
OWN = {"own_prompts": True}
QUESTIONS: tuple[Conversation, ...] = (
    *(asking("x" * length) for length in (1, 3, 30, 31, 32, 33, 64, 100)),
    asking("What is two and two?"),
    asking("Write a loop."),
    (Message("system", "Be brief."), Message("user", "Why?")),
    (Message("user", "hi"), Message("assistant", "Hello. " * 5), Message("user", "And now?")),
)


@dataclass(frozen=True)
class Served:
    """A running server and the same model at hand."""

    url: str
    generator: FusedGenerator
    folder: Path

    @property
    def client(self) -> Any:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)

    @property
    def log(self) -> str:
        """All that the server has said."""
        return (self.folder / "serve.log").read_text()

    def metric(self, name: str) -> float:
        """A counter, over all its labels."""
        text = openai.DefaultHttpxClient().get(self.url.removesuffix("/v1") + "/metrics").text
        values = [float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)]
        assert values, f"the server counts no {name}"
        return sum(values)

    def complete(self, conversation: Conversation, *, extra: dict[str, Any] | None = None, **changes: Any) -> Any:
        """The one choice, by the real client, greedy."""
        request = vllm_request(self.generator.encoder, conversation)
        own = request.pop("extra_body")
        options = {"model": "tiny", "max_tokens": NUM_TOKENS, "temperature": 0, **request, **changes}
        found = self.client.completions.create(
            **options, extra_body={**(own if extra is None else extra), "return_token_ids": True}
        )
        return found.choices[0]

    def tokens(self, conversation: Conversation, **changes: Any) -> list[int]:
        """Ids of an answer without the one that ends it; its text leaves out half a letter at its end."""
        ends = self.generator.tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
        ids = list(self.complete(conversation, **changes).token_ids)
        return ids[:-1] if ids[-1] in ends else ids


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """All at once: several sizes and architectures, so kinds of blocks; chunks of 48 tokens."""
    root = tmp_path_factory.mktemp("served")
    folder = save_mixed(root / "model", templates=PAPER_TEMPLATES)
    options = ("--max-num-batched-tokens", "48", "--max-num-seqs", "6")
    own = ("--additional-config", '{"own_prompts": true}', "--served-model-name", "tiny", "--enable-prefix-caching")
    with install().serve(folder, *SMALL, *options, "--block-size", "32", *own, folder=root) as url:
        yield Served(url, FusedGenerator.from_pretrained(str(folder), dtype=torch.float32), root)


@cache
def answer(generator: FusedGenerator, conversation: Conversation) -> list[int]:
    params = SamplingParams(max_tokens=NUM_TOKENS)
    return list(generator.generate([conversation], params)[0].token_ids)


def expected(generator: FusedGenerator, conversations: Sequence[Conversation]) -> list[list[int]]:
    """One conversation at a time, by `generate()`."""
    return [answer(generator, one) for one in conversations]


def test_each_specialist_reads_its_own_prompt_alone_and_in_a_crowd(served: Served):
    answers = expected(served.generator, QUESTIONS)
    assert len(set(map(tuple, answers))) > len(QUESTIONS) // 2, "answers that are all alike would prove little"

    alone = [served.tokens(conversation) for conversation in QUESTIONS]
    with ThreadPoolExecutor(2 * len(QUESTIONS)) as pool:
        together = list(pool.map(served.tokens, QUESTIONS * 2))

    assert alone == answers
    assert together == answers * 2


def test_the_longest_prompt_for_all_gives_other_answers(served: Served):
    """So the test before would see it."""
    answers = expected(served.generator, QUESTIONS)

    one_for_all = [served.tokens(one, extra={}) for one in QUESTIONS]

    assert sum(a != b for a, b in zip(one_for_all, answers, strict=True)) > len(QUESTIONS) // 2


def test_a_request_that_brings_no_prompts_is_read_as_ever(served: Served):
    ids = make_tokenizer()("two and two", add_special_tokens=False)["input_ids"]

    def ask(index: int) -> list[int]:
        plain: dict[str, Any] = {"prompt": ids, "extra": {}} if index % 2 else {}
        return served.tokens(QUESTIONS[index], **plain)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))

    (plain,) = served.generator.complete([ids], SamplingParams(max_tokens=NUM_TOKENS))
    answers = expected(served.generator, QUESTIONS[:8])
    assert found == [list(plain.token_ids) if index % 2 else answer for index, answer in enumerate(answers)]


def test_a_client_with_nothing_but_the_folder_asks_the_same(served: Served):
    by_folder = vllm_request(prompt_encoder(served.folder / "model"), QUESTIONS[8])

    found = served.tokens(QUESTIONS[0], prompt=by_folder["prompt"], extra=by_folder["extra_body"])

    assert found == expected(served.generator, QUESTIONS[8:9])[0]


def test_no_prefix_is_taken_from_a_cache(served: Served):
    """It was asked for; but a block that is found by one prompt says nothing of the others."""
    for _ in range(2):
        served.complete(QUESTIONS[7])

    assert served.metric("vllm:prompt_tokens_total") > 0
    assert served.metric("vllm:prefix_cache_hits_total") == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extra": {"vllm_xargs": {"prompt_lengths": [1, 1], "prompt_ids": [5, 6]}}}, "has 2 prompts"),
        ({"extra": {"vllm_xargs": {"prompt_lengths": [1, 1, 1], "prompt_ids": [5, 6, 999]}}}, "holds 999"),
        ({"extra": {"vllm_xargs": {"prompt_ids": [5]}}}, "prompt_lengths should be a list"),
        ({"echo": True, "logprobs": 1}, "none of them has a score"),
        ({"prompt": [5] * 600}, "512"),
    ],
)
def test_a_mistake_in_a_request_is_one_line_and_a_status(served: Served, changes: dict[str, Any], words: str):
    with pytest.raises(openai.BadRequestError) as error:
        served.complete(QUESTIONS[0], **changes)

    assert words in str(error.value)


def test_a_request_with_another_prompt_than_its_longest_ends_at_once_and_others_go_on(served: Served):
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        others = pool.map(served.tokens, QUESTIONS)
        wrong = [served.complete(QUESTIONS[0], prompt=prompt) for prompt in ([5, 6], [5] * 100)]

    assert [(one.text, one.finish_reason) for one in wrong] == [("", "stop")] * 2
    assert "the request's prompt has 2 tokens, but the longest of prompt_ids has" in served.log
    assert list(others) == expected(served.generator, QUESTIONS)


def test_the_server_says_that_this_is_experimental(served: Served):
    assert "own_prompts is experimental" in served.log
