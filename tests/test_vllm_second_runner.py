"""Own prompts by the hook made for them, in vLLM's second model runner, its Triton kernels interpreted."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from helpers import PAPER_TEMPLATES, make_tokenizer
from test_vllm_own_served import NUM_TOKENS, OWN, QUESTIONS
from ultrafuser.generation import SamplingParams
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.vllm_plugin.requests import write_prompts
from vllm_helpers import install, make_servable, save

DRIVER = Path(__file__).with_name("vllm_second_runner.py")


def test_the_model_state_gives_each_specialist_its_own_prompt(tmp_path: Path):
    home = install()
    found = subprocess.run([home.python, "-c", "import triton"], env=home.environment, capture_output=True)
    if found.returncode:
        pytest.skip("Triton is not in the environment of vLLM: pip install --no-deps triton==3.7.1 there")
    folder = save(make_servable(templates=PAPER_TEMPLATES), tmp_path / "model")
    generator = FusedGenerator.from_pretrained(str(folder), dtype=torch.float32)
    prompts = [generator.encoder.encode_prompt(conversation) for conversation in QUESTIONS]
    job = {
        "name": "own",
        "model": str(folder),
        "prompts": [list(max(rows, key=len)) for rows in prompts],
        "extra": [write_prompts(rows) for rows in prompts],
        "sampling": {"max_tokens": NUM_TOKENS},
        "args": {
            "enforce_eager": True,
            "additional_config": OWN,
            "max_num_batched_tokens": 64,  # so that prompts are read in chunks
            "max_num_seqs": 8,
        },
    }
    (tmp_path / "jobs.json").write_text(json.dumps([job]))

    ended = subprocess.run(
        [home.python, DRIVER, tmp_path / "jobs.json", tmp_path / "answers.json"],
        capture_output=True,
        text=True,
        env=home.environment | {"VLLM_LOGGING_LEVEL": "INFO"},
        timeout=900,
    )

    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "Using V2 Model Runner" in ended.stderr + ended.stdout
    params = SamplingParams(max_tokens=NUM_TOKENS)
    expected = [list(generator.generate([one], params)[0].token_ids) for one in QUESTIONS]
    ends = set(make_tokenizer().convert_tokens_to_ids(["</s>", "<|im_end|>"]))
    tokens = json.loads((tmp_path / "answers.json").read_text())["own"]["tokens"]
    assert [ids[:-1] if ids and ids[-1] in ends else ids for ids in tokens] == expected
