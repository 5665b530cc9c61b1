"""Does vLLM write what `generate()` writes? Greedy, fp32, on the questions of held-out records.

    python studies/vllm_equality.py runs/smollm2/stage1-gate --data recipes/smollm2.yaml --prompts 100

Runs our model here and vLLM in the environment of `scripts/vllm_env.sh`, all prompts at once and one by one. Where
two tokens differ, it tells how far apart their logits are: rounding can only swap what is nearly equal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ultrafuser.export.records import held_out_conversations
from ultrafuser.files import write_text_atomically
from ultrafuser.generation import SamplingParams
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.model.load import LoadOptions, load_model
from ultrafuser.provenance import hardware, versions

ROOT = Path(__file__).resolve().parent.parent


def make_prompts(generator: FusedGenerator, data: Path, number: int) -> list[list[int]]:
    """Ids of the first questions, taken from the domains in turn, in the first specialist's template."""
    domains = held_out_conversations(data, per_domain=number)
    questions = [
        c[: next(i for i, m in enumerate(c) if m.role == "user") + 1] for cs in zip_longest(domains) for c in cs
    ]
    return [list(generator.encoder.encode_prompt(question)[0]) for question in questions[:number]]


def zip_longest(domains: Any) -> list[list[Any]]:
    """Conversations in turn: the first of every domain, the second of every domain, ..."""
    longest = max(map(len, domains.values()))
    return [[own[i] for own in domains.values() if i < len(own)] for i in range(longest)]


def ask_vllm(model: str, prompts: Sequence[Sequence[int]], tokens: int, alone: int) -> dict[str, Any]:
    """Answers of vLLM: all prompts together, and the first `alone` of them one after another."""
    environment = subprocess.run(
        [ROOT / "scripts" / "vllm_env.sh"], check=True, capture_output=True, text=True
    ).stdout.strip()
    python = Path(environment) / "bin" / "python"
    longest = max(map(len, prompts)) + tokens
    args = {"enforce_eager": True, "max_model_len": longest, "max_num_seqs": 128, "enable_prefix_caching": False}
    sampling = {"max_tokens": tokens}
    place = str(Path(model).resolve()) if Path(model).exists() else model
    job = {"model": place, "args": args, "sampling": sampling}
    jobs: list[dict[str, Any]] = [{**job, "name": "together", "prompts": prompts}]
    if alone:
        jobs.append({**job, "name": "alone", "prompts": prompts[:alone], "alone": True})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        subprocess.run([*install, "--target", str(folder / "site"), str(ROOT)], check=True, stdout=sys.stderr)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        subprocess.run(
            [python, ROOT / "studies" / "vllm_answers.py", folder / "jobs.json", folder / "answers.json"],
            check=True,
            stdout=sys.stderr,
            env=os.environ | {"PYTHONPATH": str(folder / "site"), "VLLM_CPU_KVCACHE_SPACE": "4"},
        )
        found: dict[str, Any] = json.loads((folder / "answers.json").read_text())
        return found


@torch.no_grad()
def compare(
    model: FusedForCausalLM, prompts: Sequence[Sequence[int]], ours: Sequence[Sequence[int]], theirs: Sequence[Any]
) -> dict[str, Any]:
    """Equal answers, and for each that differs the gap of the two logits where it first does."""
    ends = model.generation_config.eos_token_id or []
    stops = set(ends if isinstance(ends, list) else [ends])
    gaps: list[float | None] = []
    for prompt, mine, other in zip(prompts, ours, theirs, strict=False):
        answer = other[:-1] if other and other[-1] in stops else other
        if list(mine) == answer:
            continue
        same = next((i for i, (a, b) in enumerate(zip(mine, answer, strict=False)) if a != b), None)
        if same is None:
            gaps.append(None)  # one ended before the other
            continue
        logits = model(torch.tensor([[*prompt, *mine[:same]]]), logits_to_keep=1).logits[0, -1]
        gaps.append(float(logits[mine[same]] - logits[answer[same]]))
    return {"prompts": len(theirs), "equal": len(theirs) - len(gaps), "gaps_where_not": gaps}


def main() -> None:
    """Ask both and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--alone", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, LoadOptions(dtype="float32"))
    generator = FusedGenerator(model, tokenizer, batch_tokens=options.batch_tokens)
    prompts = make_prompts(generator, options.data, options.prompts)
    started = time.perf_counter()
    ours = [list(a.token_ids) for a in generator.complete(prompts, SamplingParams(max_tokens=options.tokens))]
    print(f"generate(): {len(prompts)} answers in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    answers = ask_vllm(options.model, prompts, options.tokens, options.alone)
    report: dict[str, Any] = {"model": options.model, "tokens": options.tokens, "hardware": hardware()}
    report |= {"versions": versions()}
    for way, found in answers.items():
        report[way] = compare(model, prompts, ours, found["tokens"]) | {"seconds": found["generate_s"]}
        print(f"{way}: {report[way]['equal']} of {report[way]['prompts']} equal; gaps: {report[way]['gaps_where_not']}")
    if options.json is not None:
        write_text_atomically(json.dumps(report, indent=1, default=str) + "\n", options.json)


if __name__ == "__main__":
    main()
