"""Decoding speed of the engine on a GPU: one specialist, the fusion of three, a shared base, beside transformers.

    python benchmarks/decode_gpu.py --json decode_gpu.json               # SmolLM2-135M's and Llama-2-7B's shapes
    python benchmarks/decode_gpu.py --shapes smollm2-135m --batches 1 16

Weights are random numbers in bf16, which cost what trained ones do; drafts, whose worth depends on the text, are not
measured here. Everything runs to the last token wanted. "graphs" replays each step as a CUDA graph, which is what the
engine does unless told otherwise; "compiled" lets torch.compile make the step first; "as it is" launches every kernel.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from decode import loop_ms, prefill_seconds, transformers_ms
from made_up import make_tokenizer
from peft import LoraConfig
from shared_base import LINEARS, make_up
from transformers import LlamaConfig, LlamaForCausalLM

from ultrafuser.engine.bench import DecodeTiming, time_decoding, time_prefill
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.graphs import StepGraphs
from ultrafuser.engine.llama import LlamaStack
from ultrafuser.engine.options import EngineOptions
from ultrafuser.files import write_text_atomically
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.lora import Adapter
from ultrafuser.provenance import describe_run

NAMES = ("text", "code", "math")
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama2-7b": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
}
PROMPT, CONTEXT, PREFILL = 100, 640, 512  # tokens


class Bench:
    """One shape of specialists.

    Args:
        shape: Its name.
        device: Where.
        batches: Choices at once.
        tokens: Of every answer.
        compiled: Measure compiled steps, too.
    """

    def __init__(
        self, shape: str, device: torch.device, *, batches: Sequence[int], tokens: int, compiled: bool = False
    ) -> None:
        self.config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)
        self.device, self.batches, self.tokens, self.is_compiled = device, batches, tokens, compiled
        self.tokenizer = make_tokenizer(self.config.vocab_size)
        self.timings: list[DecodeTiming] = []
        self.numbers: dict[str, float] = {}

    def model(self) -> Any:
        """A random one."""
        with self.device:
            model: Any = LlamaForCausalLM(self.config)
        return model.to(torch.bfloat16).eval()

    def fused(self, specialists: dict[str, Any], **options: Any) -> Any:
        """A fusion of specialists."""
        make: Any = FusedForCausalLM.from_specialists
        fused = make(specialists, templates=["plain"] * len(specialists), tokenizer=self.tokenizer, **options)
        return fused.to(self.device)

    def engine(self, fused: Any) -> Engine:
        """Without drafts."""
        options = EngineOptions(max_context=CONTEXT, drafts=(), max_choices=max(self.batches), chunk=PREFILL)
        return Engine(fused, self.tokenizer, options)

    def prompts(self, num_specialists: int, number: int) -> list[tuple[tuple[int, ...], ...]]:
        """Random ones; specialists' rows differ in length, as those of different templates do."""
        draw = torch.Generator().manual_seed(1)
        high = self.config.vocab_size
        return [
            tuple(
                tuple(torch.randint(5, high, (PROMPT + 3 * j,), generator=draw).tolist())
                for j in range(num_specialists)
            )
            for _ in range(number)
        ]

    def time(self, name: str, engine: Engine, batches: Sequence[int] | None = None) -> None:
        """A line for every batch that fits."""
        for batch in batches or self.batches:
            if batch > engine.num_slots:
                print(f"  {name}: {batch} choices do not fit at once")
                continue
            prompts = self.prompts(len(engine.names), 2 * batch)
            began = time.perf_counter()
            time_decoding(engine, prompts[:batch], name=name, batch=batch, max_tokens=4)
            self.numbers[f"{name}, batch {batch}: seconds until it is warm"] = time.perf_counter() - began
            self.show(time_decoding(engine, prompts, name=name, batch=batch, max_tokens=self.tokens))

    def show(self, t: DecodeTiming) -> None:
        """Keep a line and print it."""
        self.timings.append(t)
        rate = f"{t.bandwidth:7.0f} GB/s" if t.bandwidth else ""
        print(
            f"  {t.name:38} n={t.num_specialists} batch {t.batch:2}: {t.ms_per_token:7.2f} ms/token "
            f"{t.tokens_per_s:8.1f} tokens/s {rate}",
            flush=True,
        )

    def by_hand(self, name: str, fused: Any, measure: Callable[[], float]) -> None:
        """A line of an alternative."""
        ms = measure()
        self.show(DecodeTiming(name, len(fused.names), 1, ms, 1e3 / ms, 1.0, None, 0))

    def run(self) -> dict[str, Any]:
        """Everything; what is done with is given back first, since three specialists may fill the device."""
        for part in (self.together, self.shared_base):
            part()
            gc.collect()
            torch.cuda.empty_cache()
        return {"timings": [asdict(t) for t in self.timings], "numbers": self.numbers}

    def together(self) -> None:
        """One specialist, then it and two more."""
        alone = self.model()
        one = self.fused({"text": alone})
        row = self.prompts(1, 1)[0]
        self.by_hand("transformers", one, lambda: transformers_ms(alone, row[0], self.tokens))
        self.time("one specialist, graphs", self.engine(one))
        fused = self.fused({"text": alone, **{name: self.model() for name in NAMES[1:]}})
        rows = self.prompts(3, 1)[0]
        self.by_hand("careful loop", fused, lambda: loop_ms(fused, rows, self.tokens, cached=True))
        text = ((rows[0] * 10)[:PREFILL],) * 3
        theirs = prefill_seconds(fused, text)
        gc.collect()
        engine = self.engine(fused)
        self.time("three specialists, graphs", engine)
        ours = time_prefill(engine, text)
        self.numbers |= {"prefill ms, transformers": 1e3 * theirs, "prefill ms, engine": 1e3 * ours}
        print(f"  {PREFILL} prompt tokens: engine {1e3 * ours:.1f} ms, transformers {1e3 * theirs:.1f} ms")
        self.without_graphs(engine)

    def without_graphs(self, engine: Engine) -> None:
        """What a graph takes alone, and steps that are no graphs of what is written."""
        (group,) = engine.runner.groups
        graphs, stack = group.graphs, group.backbone
        assert graphs is not None
        assert isinstance(stack, LlamaStack)
        self.numbers["ms of a graph of one token alone"] = replay_ms(graphs)
        print(f"  a graph of one token alone: {self.numbers['ms of a graph of one token alone']:.2f} ms")
        group.graphs = None
        self.time("three specialists, as it is", engine, self.batches[:1])
        if self.is_compiled:
            group.graphs = StepGraphs(stack, group.cache, compile_with="inductor")
            self.time("three specialists, compiled", engine, self.batches[:1])

    def shared_base(self) -> None:
        """Three adapters of one base, of rank 16."""
        config = LoraConfig(r=16, lora_alpha=32, target_modules=list(LINEARS))
        models = make_up({name: Adapter(config) for name in NAMES}, self.model())
        fused = self.fused(dict(models), shared_base=True).to(torch.bfloat16)
        self.time("shared base, graphs", self.engine(fused))


def replay_ms(graphs: StepGraphs, repetitions: int = 50) -> float:
    """Milliseconds of one token's graph, without anything between two of them."""
    step = min(graphs.steps.items())[1]
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repetitions):
        step.run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began) / repetitions


def copy_rate(device: torch.device) -> float:
    """GB/s at which the device copies memory, bytes read and written counted, the best of a few."""
    source = torch.zeros(2**30, dtype=torch.float32, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * source.numel() * 4 / best / 1e9


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["smollm2-135m", "llama2-7b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=32, help="of every answer")
    parser.add_argument("--compiled", action="store_true", help="measure compiled steps, too")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: benchmarks/decode.py measures on the CPU")
    device = torch.device("cuda")
    torch.set_grad_enabled(False)
    report: dict[str, Any] = {"run": describe_run(), "copies at GB/s": copy_rate(device)}
    print(f"{torch.cuda.get_device_name()}, copies at {report['copies at GB/s']:.0f} GB/s")
    for shape in options.shapes:
        print(shape)
        bench = Bench(shape, device, batches=options.batches, tokens=options.tokens, compiled=options.compiled)
        report[shape] = bench.run()
        torch.cuda.empty_cache()
        if options.json is not None:
            write_text_atomically(json.dumps(report, indent=1) + "\n", options.json)


if __name__ == "__main__":
    main()
