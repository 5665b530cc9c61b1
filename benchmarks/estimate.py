"""What `ultrafuser train --dry-run` says of memory, against what training then holds, a process for each phase.

Measured is how far the memory of the process rises above what it held before any weight was loaded, after a run of tiny
models has loaded what libraries load. Weights that nothing changes stay pages of their file, and are counted. Malloc is
told to give back what is freed (MALLOC_MMAP_THRESHOLD_) and oneDNN to keep no kernels (ONEDNN_PRIMITIVE_CACHE_CAPACITY:
it keeps 1,024, one for each shape of a bf16 product), so that what lies idle there is not counted.

Examples:
    OMP_NUM_THREADS=1 python benchmarks/estimate.py --json docs/results/estimate.json
    ULTRAFUSER_DATA=data python benchmarks/estimate.py recipes/smollm2.yaml --steps 2 --json smollm2.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ultrafuser.config.load import load_recipe
from ultrafuser.config.recipe import Recipe
from ultrafuser.provenance import describe_run

MB = 10**6
WITHIN = 0.10
CASES: dict[str, list[str]] = {
    "fp32": [],
    "fp32, checkpointing": ["train.activation_checkpointing=true"],
    "fp32, small pieces": ["train.micro_batch_tokens=512"],
    "bf16": ["train.precision=bf16"],
    "bf16, checkpointing": ["train.precision=bf16", "train.activation_checkpointing=true"],
    "bf16 weights": ["train.precision=bf16", "dtype=bfloat16"],
}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, help="default: three made-up Llamas")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=2, help="of every phase that is measured")
    parser.add_argument("--phase", action="append", help="default: all of the recipe")
    parser.add_argument("--case", action="append", choices=CASES, help="default: all; of a recipe as it is: none")
    parser.add_argument("--small", action="store_true", help="made-up models of a tenth of the size, to try this out")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(measure_here(**json.loads(options.child))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = options.recipe or make_up(Path(folder), small=options.small)
        cases = options.case or (["as it is"] if options.recipe else list(CASES))
        for case in cases:
            overrides = [*options.set, *CASES.get(case, [])]
            for phase in options.phase or phases_of(load_recipe(recipe, overrides)):
                row = {"case": case, "phase": phase, **measure(recipe, overrides, phase, options.steps)}
                rows.append(row)
                print(show(row), flush=True)
    worst = max(abs(row["error"]) for row in rows)
    result = {"run": describe_run(), "within": worst <= WITHIN, "worst": round(worst, 4), "rows": rows}
    print(f"worst error {worst:.1%}: {'within' if worst <= WITHIN else 'NOT within'} {WITHIN:.0%}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def phases_of(recipe: Recipe) -> list[str]:
    """Names of the phases, of equal tune phases the first."""
    tuned = [f"tune-{name}" for name, part in recipe.specialists.items() if part.tune is not None][:1]
    return [*tuned, *(name for name in ("stage1", "stage2") if getattr(recipe, name) is not None)]


def measure(recipe: Path, overrides: list[str], phase: str, steps: int) -> dict[str, Any]:
    """One phase in a process of its own."""
    job = {"recipe": str(recipe), "overrides": overrides, "phase": phase, "steps": steps}
    idle = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
    }
    environment = {**os.environ, **idle}
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_here(recipe: str, overrides: list[str], phase: str, steps: int) -> dict[str, Any]:
    """In the child: the estimate, then a few steps of the phase, and the peak of the process over its start."""
    from ultrafuser.model.memory import peak_bytes, reset_peak
    from ultrafuser.train.estimate.devices import this_machine
    from ultrafuser.train.estimate.estimate import estimate_phases, gather_ingredients
    from ultrafuser.train.trainer import Trainer

    loaded = shorten(load_recipe(recipe, overrides), steps)
    ingredients = gather_ingredients(loaded)
    device = torch.device(loaded.train.device or "cpu")
    (estimate,) = (e for e in estimate_phases(loaded, this_machine(str(device)), ingredients) if e.name == phase)
    warm_up(overrides, phase)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(loaded.model_copy(update={"output": Path(folder)}))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        reset_peak(device)
        before = held_bytes(device)
        run_phase(trainer, phase)
        measured = peak_bytes(device) - before
    return {
        "estimated_mb": round(estimate.memory.num_bytes / MB, 1),
        "measured_mb": round(measured / MB, 1),
        "error": round(estimate.memory.num_bytes / measured - 1, 4),
        "moment": estimate.memory.moment,
        "parts_mb": {name: round(count / MB, 1) for name, count in estimate.memory.parts.items()},
    }


def shorten(recipe: Recipe, steps: int) -> Recipe:
    """A recipe whose phases end after some steps; it is planned and run alike."""
    specialists = {
        name: part.model_copy(update={"tune": part.tune and part.tune.model_copy(update={"steps": steps})})
        for name, part in recipe.specialists.items()
    }
    stages = {
        name: stage.model_copy(update={"steps": steps, "warmup_steps": 0})
        for name in ("stage1", "stage2")
        if (stage := getattr(recipe, name)) is not None
    }
    data = recipe.data and recipe.data.model_copy(update={"benchmarks": None})
    return recipe.model_copy(update={"specialists": specialists, "data": data, **stages})


def run_phase(trainer: Any, phase: str) -> None:
    """One phase over the models as they are."""
    recipe = trainer.recipe
    if phase.startswith("tune-"):
        name = phase.removeprefix("tune-")
        source = recipe.specialists[name]
        trainer.run_stage(phase, trainer.build({name: source}), source.tune, domains=source.tune.domains)
    else:
        trainer.run_stage(phase, trainer.build(recipe.specialists), getattr(recipe, phase))


def warm_up(overrides: list[str], phase: str) -> None:
    """The same phase of models of a few MB: what libraries load and hold for good belongs to no model."""
    from ultrafuser.train.trainer import Trainer

    own = [text for text in overrides if text.startswith(("train.", "dtype="))]
    with tempfile.TemporaryDirectory() as folder:
        tiny = shorten(load_recipe(make_up(Path(folder), small=True), own), 1)
        trainer = Trainer(tiny.model_copy(update={"output": Path(folder) / "run"}))
        run_phase(trainer, phase if phase in ("stage1", "stage2") else "tune-text")
    gc.collect()


def held_bytes(device: torch.device) -> int:
    """Of this process, now; on a GPU of its tensors."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_up(work: Path, *, small: bool) -> Path:
    """Three random Llamas of different templates, a domain of numbered questions for each, and a recipe over them."""
    from made_up import make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    templates = {"text": "ultralm", "code": "codellama", "math": "wizardmath"}
    hidden = 128 if small else 512
    shape: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "vocab_size": 1024 if small else 8192,
        "tie_word_embeddings": False,
    }
    for seed, name in enumerate(templates):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
        lines = [
            json.dumps({"prompt": f"What is {name} number {i}?", "response": f"It is {i}, {name} says. " * (2 + i % 5)})
            for i in range(120)
        ]
        (work / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tune = {"steps": 2, "records_per_domain": 12, "domains": ["text"]}
    stage = {"steps": 2, "records_per_domain": 4}
    recipe = {
        "name": "made-up",
        "specialists": {
            n: {"model": str(work / n), "template": t, **({"tune": tune} if n == "text" else {})}
            for n, t in templates.items()
        },
        "data": {"domains": {name: {"sources": [{"path": str(work / f"{name}.jsonl")}]} for name in templates}},
        "train": {"micro_batch_tokens": 1024, "loss_chunk": 256, "validation_records": 1, "device": "cpu"},
        "stage1": stage,
        "stage2": {**stage, "train_specialists": True},
    }
    path = work / "made-up.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def show(row: dict[str, Any]) -> str:
    """A row for people."""
    return (
        f"{row['case']:<20} {row['phase']:<12} estimated {row['estimated_mb']:>8,.1f} MB  measured "
        f"{row['measured_mb']:>8,.1f} MB  {row['error']:+.1%}  ({row['moment']})"
    )


if __name__ == "__main__":
    main()
