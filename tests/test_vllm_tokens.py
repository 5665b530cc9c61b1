"""vLLM writes the tokens that `generate()` writes, whatever it does to write them fast; all in fp32, greedy.

One process of the environment of vLLM answers all jobs; the tests compare. Numbers for a real model:
studies/vllm_equality.py.
"""

import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import PAPER_TEMPLATES, make_fused, make_model, make_tokenizer, save_specialist
from ultrafuser.generation import SamplingParams
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.generator import FusedGenerator
from vllm_helpers import HIDDEN, VllmHome, install, make_servable, save, scale_down

NUM_PROMPTS = 100
NUM_TOKENS = 16
Prompts = list[list[int]]


def make_prompts(number: int, longest: int = 80) -> Prompts:
    """Of all lengths; a third of them open with the same forty tokens, which a prefix cache may keep."""
    draw = random.Random(0)
    opening = [draw.randrange(5, 261) for _ in range(40)]
    prompts = []
    for index in range(number):
        rest = [draw.randrange(5, 261) for _ in range(draw.randint(1, longest - 40))]
        prompts.append([*opening, *rest] if index % 3 == 0 else rest)
    return prompts


def save_gate_only(folder: Path) -> Path:
    """A gate over three folders: a tied head, more rows than are shared, and weights in bf16."""
    trio = {
        "text": make_model(seed=4, hidden_size=HIDDEN, num_key_value_heads=2, tied=True),
        "code": make_model(seed=5, hidden_size=HIDDEN, num_key_value_heads=2, vocab_size=270),
        "math": make_model(seed=6, hidden_size=HIDDEN, num_key_value_heads=2),
    }
    for model in trio.values():
        scale_down(model)
    trio["math"].to(torch.bfloat16)
    folders = {name: save_specialist(model, folder / name) for name, model in trio.items()}
    fused = FusedForCausalLM.from_specialists(folders, templates="chatml", gate_hidden_size=8)
    fused.fusion_gate.layers[-1].weight.data.mul_(20)
    return save(fused, folder / "gate", gate_only=True)


def save_shallow(folder: Path) -> Path:
    """Two specialists of one layer, as little as can be compiled and still be fused: a compiler takes its time."""
    parts = {
        name: make_model(seed=seed, hidden_size=HIDDEN, num_key_value_heads=2, num_hidden_layers=1)
        for seed, name in enumerate(("text", "code"))
    }
    for model in parts.values():
        scale_down(model)
    return save(make_servable_from(parts), folder)


def save_mixed(folder: Path, **options: Any) -> Path:
    """Two architectures and two hidden sizes, so that the gate projects; one scales its logits."""
    parts = {
        "text": make_model("llama", seed=0, hidden_size=HIDDEN, num_key_value_heads=2),
        "code": make_model("qwen2", seed=1, hidden_size=2 * HIDDEN, num_key_value_heads=2, num_attention_heads=4),
        "math": make_model("mistral", seed=2, hidden_size=HIDDEN, num_key_value_heads=2, sliding_window=None),
    }
    for model in parts.values():
        scale_down(model)
    return save(make_servable_from(parts, **options), folder)


def make_servable_from(parts: dict[str, Any], **options: Any) -> FusedForCausalLM:
    return make_fused(parts, **{"templates": "chatml", **options})


@pytest.fixture(scope="module")
def home() -> VllmHome:
    return install()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    trio = make_servable(templates=PAPER_TEMPLATES)
    save_specialist(trio.specialists["text"], root / "drafter")
    return {
        "shards": save(trio, root / "shards", max_shard_size="200KB"),
        "gate": save_gate_only(root),
        "mixed": save_mixed(root / "mixed"),
        "solo": save(make_servable(solo="code"), root / "solo"),
        "uniform": save(make_servable(weighting="uniform", fusion_space="logprobs"), root / "uniform"),
        "shallow": save_shallow(root / "shallow"),
        "drafter": root / "drafter",
    }


PROMPTS = make_prompts(NUM_PROMPTS)
FEW = PROMPTS[:12]


def jobs(folders: dict[str, Path]) -> list[dict[str, Any]]:
    eager = {"enforce_eager": True}
    greedy = {"max_tokens": NUM_TOKENS, "ignore_eos": True}

    def job(name: str, model: str, prompts: Prompts, args: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        return {
            "name": name,
            "model": str(folders[model]),
            "prompts": prompts,
            "args": {**eager, **(args or {})},
            "sampling": {**greedy, **more.pop("sampling", {})},
            **more,
        }

    drafter = {"method": "draft_model", "model": str(folders["drafter"]), "num_speculative_tokens": 3}
    lookup = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    chunks = {"max_num_batched_tokens": 32, "max_num_seqs": 16, "enable_prefix_caching": True, "block_size": 32}
    return [
        job("together", "shards", PROMPTS),
        job("alone", "shards", PROMPTS, alone=True),
        job("chunks", "shards", PROMPTS[:40], chunks),
        job("scored", "shards", FEW, {"enable_prefix_caching": False}, sampling={"prompt_logprobs": 0}, reload=True),
        *(job(name, name, FEW) for name in ("gate", "mixed", "solo", "uniform")),
        job("drafted", "shards", FEW, {"speculative_config": drafter}),
        job("compiled", "shallow", FEW, {"enforce_eager": False}),
        job("split", "shards", FEW[:4], {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}),
        {
            "name": "lm-eval",
            "task": "lm-eval",
            "model": str(folders["gate"]),
            "args": {**eager, "distributed_executor_backend": "uni"},
            "pairs": [["two and two", " is four"], ["x", "y"]],
            "questions": ["ab", "cde"],
        },
        # Last: what it imports breaks the next start in the same process (vLLM 0.32.0).
        job("looked-up", "shards", FEW, {"speculative_config": lookup}),
    ]


@pytest.fixture(scope="module")
def answers(home: VllmHome, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return home.answer(jobs(folders), tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> Callable[[str, Prompts], Prompts]:
    """Tokens that `generate()` writes, one prompt at a time."""
    known: dict[tuple[str, int], list[int]] = {}

    @cache
    def load(name: str) -> FusedForCausalLM:
        model = FusedForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        return model

    def greedy(name: str, prompts: Prompts) -> Prompts:
        for index, prompt in enumerate(prompts):
            if (name, index) not in known:
                written = load(name).generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False)
                known[name, index] = written[0, len(prompt) :].tolist()
        return [known[name, index] for index in range(len(prompts))]

    return greedy


@torch.no_grad()
def log_probs(model: FusedForCausalLM, ids: Sequence[int]) -> list[float]:
    """Of every token but the first, given those before."""
    logits = model(torch.tensor([list(ids)])).logits[0, :-1]
    found: list[float] = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return found


@pytest.mark.parametrize("way", ["together", "alone"])
def test_a_hundred_prompts_get_the_tokens_of_generate(way: str, answers: Any, expected: Any):
    assert answers[way]["tokens"] == expected("shards", PROMPTS)


def test_the_tokens_are_worth_comparing(expected: Any):
    """Answers differ, and words within them: a model that says one thing would prove nothing."""
    written = expected("shards", PROMPTS)

    assert len({tuple(ids) for ids in written}) > 60
    assert sum(len(set(ids)) for ids in written) / len(written) > 3


def test_log_probabilities_are_those_of_the_fused_distribution(answers: Any, folders: Any):
    model = FusedForCausalLM.from_pretrained(folders["shards"]).eval()

    for prompt, ids, found in zip(
        PROMPTS, answers["together"]["tokens"], answers["together"]["log_probs"], strict=True
    ):
        assert found == pytest.approx(log_probs(model, [*prompt, *ids])[len(prompt) - 1 :], abs=1e-4)


def test_prompts_are_scored_by_the_fused_distribution(answers: Any, folders: Any):
    model = FusedForCausalLM.from_pretrained(folders["shards"]).eval()

    for prompt, (_, *found) in zip(FEW, answers["scored"]["prompt_log_probs"], strict=True):
        assert found == pytest.approx(log_probs(model, prompt), abs=1e-4)


def test_prefill_in_chunks_and_a_prefix_cache_change_nothing(answers: Any, expected: Any):
    assert answers["chunks"]["tokens"] == expected("shards", PROMPTS[:40])
    assert sum(answers["chunks"]["cached_tokens"]) > 0


@pytest.mark.parametrize("way", ["drafted", "looked-up"])
def test_speculation_changes_no_token(way: str, answers: Any, expected: Any):
    assert answers[way]["tokens"] == expected("shards", FEW)


def test_a_compiled_model_writes_the_same(answers: Any, expected: Any):
    tokens = expected("shallow", FEW)

    assert len(set(map(tuple, tokens))) > len(FEW) // 2, "answers that are all alike would prove little"
    assert answers["compiled"]["tokens"] == tokens


def test_no_specialist_loads_the_compiled_graph_of_another(answers: Any):
    """Names of layers, by which a layer finds its cache, may be constants in it."""
    kept = answers["compiled"]["compiled_to"]

    assert [name.split(".")[1] for name in kept] == ["text", "code"]
    assert len(set(kept.values())) == 2


def test_weights_are_not_loaded_over_a_joined_head(answers: Any):
    assert "loaded once: start the server anew" in answers["scored"]["reloaded"]


def test_two_processes_that_share_every_layer_write_the_same(answers: Any, expected: Any):
    """Tensor parallel: heads, hidden layers and vocabulary are cut, gate and hidden states are whole in each."""
    assert answers["split"]["tokens"] == expected("shards", FEW[:4])


@pytest.mark.parametrize("name", ["gate", "mixed", "solo", "uniform"])
def test_every_kind_of_checkpoint_writes_its_tokens(name: str, answers: Any, expected: Any):
    """Gate-only over a tied, a longer and a bf16 specialist; two sizes and architectures; one alone; no gate."""
    assert answers[name]["tokens"] == expected(name, FEW)


def test_lm_evals_own_model_of_vllm_scores_and_answers_as_ours(answers: Any, folders: Any):
    tokenizer = make_tokenizer()
    model = FusedForCausalLM.from_pretrained(folders["gate"], dtype=torch.float32)
    generator = FusedGenerator(model, tokenizer)

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    for (prompt, rest), (score, greedy) in zip(
        [("two and two", " is four"), ("x", "y")], answers["lm-eval"]["scores"], strict=True
    ):
        (ours,) = generator.score_continuations([(encode(prompt),) * 3], [encode(rest)])
        assert score == pytest.approx(ours.log_prob, abs=1e-3)
        assert greedy == ours.is_greedy
    texts = [answer.text for answer in generator.complete([encode("ab"), encode("cde")], SamplingParams(max_tokens=8))]
    assert answers["lm-eval"]["answers"] == texts
