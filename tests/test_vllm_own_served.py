"""Own template per specialist, in vLLM: what `generate()` writes, each specialist reading its own prompt. Experimental.

On a CPU vLLM runs its first model runner. For the second one, whose hook is for this, see `vllm_second_runner.py`.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import PAPER_TEMPLATES, make_tokenizer
from test_vllm_tokens import save_mixed
from ultrafuser.chat.messages import Conversation, Message
from ultrafuser.generation import SamplingParams
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.vllm_plugin.requests import HOW_TO_START, prompt_encoder, vllm_request, write_prompts
from vllm_helpers import SMALL, VllmHome, asking, install, make_servable, save

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

    def complete(self, conversation: Conversation, **changes: Any) -> Any:
        """By the real client, greedy."""
        request = vllm_request(self.generator.encoder, conversation)
        options = {"model": "tiny", "max_tokens": NUM_TOKENS, "temperature": 0, **request, **changes}
        return self.client.completions.create(**options)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> VllmHome:
    return install(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def served(home: VllmHome, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Prompts are read in chunks of 48 tokens of all requests together, over blocks of 32."""
    root = tmp_path_factory.mktemp("served")
    folder = save(make_servable(templates=PAPER_TEMPLATES), root / "model")
    options = ("--max-num-batched-tokens", "48", "--max-num-seqs", "6", "--block-size", "32")
    own = ("--additional-config", '{"own_prompts": true}', "--served-model-name", "tiny", "--enable-prefix-caching")
    with home.serve(folder, *SMALL, *options, *own, folder=root) as url:
        yield Served(url, FusedGenerator.from_pretrained(str(folder), dtype=torch.float32), root)


def expected(generator: FusedGenerator, conversations: Sequence[Conversation]) -> list[str]:
    """One conversation at a time, by `generate()`."""
    params = SamplingParams(max_tokens=NUM_TOKENS)
    return [generator.generate([conversation], params)[0].text for conversation in conversations]


def test_each_specialist_reads_its_own_prompt_alone_and_in_a_crowd(served: Served):
    answers = expected(served.generator, QUESTIONS)
    assert len(set(answers)) > len(QUESTIONS) // 2, "answers that are all alike would prove little"

    alone = [served.complete(conversation).choices[0].text for conversation in QUESTIONS]
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        together = [found.choices[0].text for found in pool.map(served.complete, QUESTIONS * 2)]

    assert alone == answers
    assert together == answers * 2


def test_the_longest_prompt_for_all_gives_other_answers(served: Served):
    """So the test before would see it."""
    answers = expected(served.generator, QUESTIONS)

    one_for_all = [served.complete(one, extra_body={}).choices[0].text for one in QUESTIONS]

    assert sum(a != b for a, b in zip(one_for_all, answers, strict=True)) > len(QUESTIONS) // 2


def test_a_request_that_brings_no_prompts_is_read_as_ever(served: Served):
    ids = make_tokenizer()("two and two", add_special_tokens=False)["input_ids"]

    def ask(index: int) -> str:
        plain = {"prompt": ids, "extra_body": {}} if index % 2 else {}
        found: str = served.complete(QUESTIONS[index], **plain).choices[0].text
        return found

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(8)))

    (plain,) = served.generator.complete([ids], SamplingParams(max_tokens=NUM_TOKENS))
    assert texts == [
        plain.text if index % 2 else answer for index, answer in enumerate(expected(served.generator, QUESTIONS[:8]))
    ]


def test_a_client_with_nothing_but_the_folder_asks_the_same(served: Served):
    request = vllm_request(prompt_encoder(served.folder / "model"), QUESTIONS[8])

    found = served.client.completions.create(model="tiny", max_tokens=NUM_TOKENS, temperature=0, **request)

    assert found.choices[0].text == expected(served.generator, QUESTIONS[8:9])[0]


def test_no_prefix_is_taken_from_a_cache(served: Served):
    """It was asked for; but a block that is found by one prompt says nothing of the others."""
    for _ in range(2):
        served.complete(QUESTIONS[7])

    metrics = openai.DefaultHttpxClient().get(served.url.removesuffix("/v1") + "/metrics").text
    assert "vllm:prompt_tokens_total" in metrics
    assert not any(
        float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("vllm:prefix_cache_hits_total")
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extra_body": {"vllm_xargs": {"prompt_lengths": [1, 1], "prompt_ids": [5, 6]}}}, "has 2 prompts"),
        ({"extra_body": {"vllm_xargs": {"prompt_lengths": [1, 1, 1], "prompt_ids": [5, 6, 999]}}}, "holds 999"),
        ({"extra_body": {"vllm_xargs": {"prompt_ids": [5]}}}, "prompt_lengths should be a list"),
        ({"echo": True, "logprobs": 1}, "none of them has a score"),
        ({"prompt": [5] * 600}, "512"),
    ],
)
def test_a_mistake_in_a_request_is_one_line_and_a_status(served: Served, changes: dict[str, Any], words: str):
    with pytest.raises(openai.BadRequestError) as error:
        served.complete(QUESTIONS[0], **changes)

    assert words in str(error.value)


def test_a_request_with_another_prompt_than_its_longest_ends_at_once_and_others_go_on(served: Served):
    found = served.complete(QUESTIONS[0], prompt=[5, 6])

    assert found.choices[0].text == ""
    assert found.choices[0].finish_reason == "stop"
    assert "the request's prompt has 2 tokens, but the longest of prompt_ids has" in served.log
    assert served.complete(QUESTIONS[1]).choices[0].text == expected(served.generator, QUESTIONS[1:2])[0]


def test_the_server_says_that_this_is_experimental(served: Served):
    assert "own_prompts is experimental" in served.log


@pytest.fixture(scope="module")
def jobs(home: VllmHome, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process: several hidden sizes and architectures, so several kinds of blocks; too few blocks; compiled."""
    root = tmp_path_factory.mktemp("models")
    folders = {"mixed": save_mixed(root / "mixed", templates=PAPER_TEMPLATES)}
    folders["plain"] = save(make_servable(templates=PAPER_TEMPLATES), root / "plain")
    generators = {name: FusedGenerator.from_pretrained(str(f), dtype=torch.float32) for name, f in folders.items()}
    rows = generators["plain"].encoder
    prompts = [rows.encode_prompt(conversation) for conversation in QUESTIONS]
    base = {
        "prompts": [list(max(prompt, key=len)) for prompt in prompts],
        "extra": [write_prompts(prompt) for prompt in prompts],
        "sampling": {"max_tokens": NUM_TOKENS},
    }

    def job(name: str, model: str, **args: Any) -> dict[str, Any]:
        own = {"enforce_eager": True, "additional_config": OWN, "max_num_batched_tokens": 64, "max_num_seqs": 8}
        return {**base, "name": name, "model": str(folders[model]), "args": {**own, **args}}

    asked = [
        job("mixed", "mixed"),
        job("preempted", "plain", block_size=32, num_gpu_blocks_override=16),
        job("compiled", "plain", enforce_eager=False),
        {**job("drafted", "plain", speculative_config={"method": "ngram", "num_speculative_tokens": 2}), **REFUSE},
        {**job("neither", "plain", additional_config={"own_prompts": "yes"}), **REFUSE},
    ]
    answers = home.answer(asked, root)
    params = SamplingParams(max_tokens=NUM_TOKENS)
    for name, model in (("mixed", "mixed"), ("preempted", "plain"), ("compiled", "plain")):
        found = [generators[model].generate([conversation], params)[0] for conversation in QUESTIONS]
        answers[name]["expected"] = [list(one.token_ids) for one in found]
    return answers


REFUSE = {"task": "refuse"}


@pytest.mark.parametrize("name", ["mixed", "preempted", "compiled"])
def test_whatever_vllm_does_the_tokens_are_those_of_generate(name: str, jobs: dict[str, Any]):
    ends = set(make_tokenizer().convert_tokens_to_ids(["</s>", "<|im_end|>"]))
    tokens = [ids[:-1] if ids and ids[-1] in ends else ids for ids in jobs[name]["tokens"]]

    assert tokens == jobs[name]["expected"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("drafted", "own_prompts cannot be had with speculation"),
        ("neither", "own_prompts is true or false, not 'yes'"),
    ],
)
def test_what_cannot_be_had_together_is_one_line(name: str, words: str, jobs: dict[str, Any]):
    assert jobs[name]["kind"] == "ConfigError"
    assert words in jobs[name]["error"]
    assert "\n" not in jobs[name]["error"]


def test_a_server_that_was_not_started_for_it_refuses(home: VllmHome, tmp_path: Path):
    """Rather than have all read the longest prompt, which would look like an answer."""
    folder = save(make_servable(templates=PAPER_TEMPLATES), tmp_path / "model")
    prompt = [5, 6, 7]
    job = {"name": "off", "model": str(folder), "args": {"enforce_eager": True}, "prompts": [prompt]}

    with pytest.raises(AssertionError) as error:
        home.answer([{**job, "extra": [write_prompts([prompt] * 3)]}], tmp_path)

    assert HOW_TO_START in str(error.value)
