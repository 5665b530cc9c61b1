"""Stage 1 from hidden states on disk against live training: time, memory, and the same losses.

Three runs of the same stage in a process each: live, from disk for the first time, and again on the same files.

Examples:
    python benchmarks/stage1_cache.py runs/proof/recipe.yaml --specialists runs/proof/specialists --json demo.json
    ULTRAFUSER_DATA=data python benchmarks/stage1_cache.py recipes/smollm2.yaml --specialists runs/smollm2/specialists
        --set stage1.steps=6 --json smollm2.json
    python benchmarks/stage1_cache.py --made-up 100 --json memory.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ultrafuser.config.load import load_recipe
from ultrafuser.config.recipe import Recipe
from ultrafuser.provenance import describe_run

MB = 10**6
KINDS = {"live": "off", "first": "window", "again": "window"}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path)
    parser.add_argument("--specialists", type=Path, help="folder with a model folder for each name of the recipe")
    parser.add_argument("--made-up", type=int, metavar="MB", help="three random models of about that size instead")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="kept; what is measured there is not measured again"
    )
    parser.add_argument("--only", choices=KINDS, action="append", help="measure this run alone, into --work")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        recipe_file = make_up(work, options.made_up) if options.made_up else options.recipe
        if recipe_file is None:
            parser.error("give a recipe, or --made-up MB")
        recipe = load_recipe(recipe_file, [*options.set, f"train.threads={options.threads}"])
        runs = {kind: measure(recipe, options.specialists, work, kind) for kind in options.only or KINDS}
    if options.only:
        return
    check_equal(runs)
    result = {
        "what": options.recipe.stem if options.recipe else f"three made-up models of {options.made_up} MB",
        "run": describe_run(),
        "settings": {"steps": recipe.stage1.steps if recipe.stage1 else 0, "precision": recipe.train.precision},
        "runs": runs,
        "again_is_faster_by": round(runs["live"]["training_s"] / runs["again"]["training_s"], 1),
        "again_takes_less_cpu_by": round(runs["live"]["training_cpu_s"] / runs["again"]["training_cpu_s"], 1),
        "again_steps_are_faster_by": round(runs["live"]["steps_s"] / runs["again"]["steps_s"], 1),
    }
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(recipe: Recipe, specialists: Path | None, work: Path, kind: str) -> dict[str, Any]:
    """One run of the stage in a process of its own, or what was measured before."""
    kept = work / f"{kind}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_stage, args=(recipe, specialists, work, kind, KINDS[kind], sender))
    process.start()
    sender.close()
    result: dict[str, Any] = receiver.recv()
    process.join()
    kept.write_text(json.dumps(result), encoding="utf-8")
    return result


def run_stage(recipe: Recipe, specialists: Path | None, work: Path, kind: str, mode: str, sender: Any) -> None:
    """In the child: build, train the gate, tell times, losses and the most memory held."""
    from ultrafuser.train.hidden.loop import CachedLoop
    from ultrafuser.train.loop import Loop
    from ultrafuser.train.trainer import Trainer

    chosen = {
        name: part.model_copy(
            update={"tune": None, **({"model": str((specialists / name).resolve())} if specialists else {})}
        )
        for name, part in recipe.specialists.items()
    }
    cache = recipe.train.stage1_cache.model_copy(update={"mode": mode, "folder": work / "hidden"})
    recipe = recipe.model_copy(
        update={
            "output": work / kind,
            "stage2": None,
            "specialists": chosen,
            "train": recipe.train.model_copy(update={"stage1_cache": cache}),
        }
    )
    trainer = Trainer(recipe)
    assert recipe.stage1 is not None
    clock: dict[str, float] = {}
    for kind_of_loop in (Loop, CachedLoop):
        kind_of_loop.run = timed(kind_of_loop.run, clock)  # type: ignore[method-assign]
    before = memory_bytes("RssAnon") + memory_bytes("RssFile")
    watch = MemoryWatch()
    began = time.perf_counter()
    with watch:
        if mode == "off":
            model = trainer.build(chosen)
            trainer.run_stage("stage1", model, recipe.stage1)
        else:
            model = trainer.run_stage1_lean(chosen, recipe.stage1)
    ended = time.perf_counter()
    lines = [json.loads(line) for line in (work / kind / "stage1" / "metrics.jsonl").read_text().splitlines()]
    files = list((work / "hidden").glob("*.safetensors")) if (work / "hidden").exists() else []
    sender.send(
        {
            "whole_s": round(ended - began, 2),  # from loading weights to the trained gate
            "training_s": round(clock["training"], 2),  # plan, files, steps, validation; not loading and encoding
            "training_cpu_s": round(clock["cpu"], 2),  # what is left of it on a machine that does nothing else
            "steps_s": round(sum(line["seconds"] for line in lines), 2),
            "response_tokens": sum(line["tokens"] for line in lines),
            "losses": [line["loss"] for line in lines],
            "gate_norm": float(torch.cat([p.detach().flatten() for p in model.fusion_gate.parameters()]).norm()),
            "peak_mb_over_start": round((watch.peak - before) / MB),
            "peak_anonymous_mb": round(watch.peak_anonymous / MB),
            "hidden_mb": round(sum(path.stat().st_size for path in files) / MB, 1),
            "weights_mb": round(
                sum(f.stat().st_size for p in chosen.values() for f in Path(p.model).glob("*.safetensors")) / MB
            ),
        }
    )
    shutil.rmtree(work / kind)


def timed(run: Callable[..., None], clock: dict[str, float]) -> Callable[..., None]:
    """A function that notes how long it took; of nested ones the outermost counts."""

    def running(*args: Any) -> None:
        began, used = time.perf_counter(), time.process_time()
        run(*args)
        clock["training"], clock["cpu"] = time.perf_counter() - began, time.process_time() - used

    return running


def make_up(work: Path, size_mb: int) -> Path:
    """Three random Llamas, a domain of numbered questions for each, and a recipe over them."""
    from made_up import make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    per_layer = 4 * 512**2 + 3 * 512 * 1376
    templates = {"text": "ultralm", "code": "codellama", "math": "wizardmath"}
    path = work / "made-up.yaml"
    if path.exists():
        return path
    for seed, name in enumerate(templates):
        torch.manual_seed(seed)
        shape: dict[str, Any] = {
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        }
        layers = max(1, round(size_mb * MB / 4 / per_layer))
        config = LlamaConfig(vocab_size=2048, num_hidden_layers=layers, tie_word_embeddings=True, **shape)
        LlamaForCausalLM(config).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
        lines = [
            json.dumps({"prompt": f"What is {name} number {i}?", "response": f"It is {i}, as {name} says."})
            for i in range(300)
        ]
        (work / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = {
        "name": "made-up",
        "specialists": {n: {"model": str(work / n), "template": t} for n, t in templates.items()},
        "data": {"domains": {name: {"sources": [{"path": str(work / f"{name}.jsonl")}]} for name in templates}},
        "train": {"micro_batch_tokens": 512, "loss_chunk": 256, "validation_records": 1},
        "stage1": {"steps": 3, "records_per_domain": 2, "composed_share": 0.25, "learning_rate": 1e-3},
    }
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def check_equal(runs: dict[str, dict[str, Any]]) -> None:
    """Losses to fp32 rounding, or an end with the difference."""
    for kind in ("first", "again"):
        pairs = zip(runs["live"]["losses"], runs[kind]["losses"], strict=True)
        runs[kind]["largest_loss_difference"] = max(abs(a - b) / a for a, b in pairs)


class MemoryWatch:
    """The most resident memory of this process while entered, looked at every 10 ms."""

    def __init__(self) -> None:
        self.peak = self.peak_anonymous = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            anonymous = memory_bytes("RssAnon")
            self.peak_anonymous = max(self.peak_anonymous, anonymous)
            self.peak = max(self.peak, anonymous + memory_bytes("RssFile"))

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def memory_bytes(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
