"""Peak memory and time of the fused loss, forward and backward, beside the other ways to the same numbers.

On a CPU without instructions for bf16 the other ways take minutes in it, one pass of V = 152k ten: `--dtypes float32`.

Every measurement is a process of its own: the memory is how far its resident set rises above what it held with the
inputs there (gradients count); the time is the processor's, which other work on the machine disturbs less than the
clock's. Every variant runs once per round; the fastest counts. On a GPU (`--device cuda`) the memory is the
allocator's, the time the clock's, the median of several after two to warm up, all in one process, and Liger's kernel
can be compared.

Examples:
    OMP_NUM_THREADS=1 python benchmarks/fused_loss.py --json docs/results/fused_loss.json
    python benchmarks/fused_loss.py --device cuda --hidden-size 4096 --variants naive concat liger own
    OMP_NUM_THREADS=1 python benchmarks/fused_loss.py --variants own whole --hidden-size 576 --tokens 512 256 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from ultrafuser.files import write_text_atomically
from ultrafuser.model import loss_terms
from ultrafuser.model.fusion import fuse_logits
from ultrafuser.model.loss import LinearHead, fused_nll
from ultrafuser.model.loss_backends import concatenated_loss
from ultrafuser.provenance import describe_run

NUM_SPECIALISTS = 3
LEAST_SAVING, MOST_SLOWDOWN = 15.0, 1.10  # what the own way must reach: memory at V = 32k, time everywhere


@dataclass(frozen=True)
class Case:
    """One setting: M tokens, hidden size H, V vocabulary, and what is trained."""

    vocabulary: int
    tokens: int
    hidden_size: int
    dtype: str
    trained: str  # all: stage 2; gate: stage 1
    device: str = "cpu"


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case, [M, H], [V, H] and scores [M, N] of a gate."""

    hiddens: list[Tensor]
    heads: list[Tensor]
    scores: Tensor
    labels: Tensor

    @property
    def trained(self) -> list[Tensor]:
        """What a gradient is taken of."""
        return [t for t in (*self.hiddens, *self.heads, self.scores) if t.requires_grad]


def make_inputs(case: Case, *, tokens: int | None = None, vocabulary: int | None = None) -> Inputs:
    """Seeded inputs; smaller ones to warm up."""
    torch.manual_seed(0)
    tokens, vocabulary = tokens or case.tokens, vocabulary or case.vocabulary
    dtype, everything = getattr(torch, case.dtype), case.trained == "all"
    shapes = [(rows, case.hidden_size) for rows in [tokens] * NUM_SPECIALISTS + [vocabulary] * NUM_SPECIALISTS]
    tensors = [
        torch.randn(shape, device=case.device).mul_(0.5).to(dtype).requires_grad_(everything) for shape in shapes
    ]
    scores = torch.randn((tokens, NUM_SPECIALISTS), device=case.device).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device=case.device)
    return Inputs(tensors[:NUM_SPECIALISTS], tensors[NUM_SPECIALISTS:], scores, labels)


def naive(inputs: Inputs, weights: Tensor, _: int) -> Tensor:
    """Equation 1 as it is written: a tensor of logits for each specialist."""
    logits = [hidden @ head.T for hidden, head in zip(inputs.hiddens, inputs.heads, strict=True)]
    return F.cross_entropy(fuse_logits(logits, weights), inputs.labels)


def join(inputs: Inputs, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and heads as those of one model, whose head is a copy of all."""
    parts = [(hidden * weights[:, i, None]).to(hidden.dtype) for i, hidden in enumerate(inputs.hiddens)]
    return torch.cat(parts, dim=1), torch.cat(inputs.heads, dim=1)


def concat(inputs: Inputs, weights: Tensor, _: int) -> Tensor:
    """One linear layer over all hidden states, then cross-entropy in fp32."""
    hidden, head = join(inputs, weights)
    return F.cross_entropy(F.linear(hidden, head).float(), inputs.labels)


def concat_fused(inputs: Inputs, weights: Tensor, _: int) -> Tensor:
    """The same in torch's own fused loss, as it chooses its chunks."""
    hidden, head = join(inputs, weights)
    return F.linear_cross_entropy(hidden, head, inputs.labels, options=torch.nn.LinearCrossEntropyOptions())


def liger(inputs: Inputs, weights: Tensor, _: int) -> Tensor:
    """The same in Liger's kernel, which needs a GPU."""
    biases = [None] * NUM_SPECIALISTS
    return concatenated_loss(weights, inputs.labels, inputs.hiddens, inputs.heads, biases, "liger").mean()


def checkpointed(inputs: Inputs, weights: Tensor, _: int) -> Tensor:
    """The general way, for any head and space of fusion: chunks of 1,024 whose logits are made twice."""
    heads = [lambda hidden, head=head: F.linear(hidden, head) for head in inputs.heads]
    return fused_nll(inputs.hiddens, weights, inputs.labels, heads, chunk=1024).mean()


def own(inputs: Inputs, weights: Tensor, chunk: int) -> Tensor:
    """Ours."""
    heads = [LinearHead(head) for head in inputs.heads]
    return fused_nll(inputs.hiddens, weights, inputs.labels, heads, chunk=chunk).mean()


def whole(inputs: Inputs, weights: Tensor, chunk: int) -> Tensor:
    """Ours, with each head in one product and not in blocks of rows."""
    with patch.object(loss_terms, "MOST_ROWS_ON_CPU", len(inputs.heads[0])):
        return own(inputs, weights, chunk)


VARIANTS: dict[str, Callable[[Inputs, Tensor, int], Tensor]] = {
    "naive": naive,
    "concat": concat,
    "linear_cross_entropy": concat_fused,
    "liger": liger,
    "checkpointed": checkpointed,
    "own": own,
    "whole": whole,
}
OTHERS = ("naive", "concat", "linear_cross_entropy", "checkpointed", "liger")
ON_CPU = ("naive", "concat", "linear_cross_entropy", "checkpointed", "own")
GPU_REPETITIONS = 7


def run_once(inputs: Inputs, variant: str, chunk: int) -> tuple[float, list[Tensor]]:
    """Loss and gradients."""
    loss = VARIANTS[variant](inputs, torch.softmax(inputs.scores, dim=-1), chunk)
    return float(loss), list(torch.autograd.grad(loss, inputs.trained))


def memory_kib(field: str) -> int:
    """A line of the kernel's on this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def measure_here(case: Case, variant: str, chunk: int) -> dict[str, Any]:
    """Run a case in this process: what a child does."""
    small = make_inputs(case, tokens=64, vocabulary=1000)
    run_once(small, variant, chunk)  # loads what is loaded at first use
    inputs = make_inputs(case)
    if case.device != "cpu":
        return measure_on_gpu(inputs, variant, chunk)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = memory_kib("VmRSS")
    clock, processor = time.perf_counter(), time.process_time()
    loss, gradients = run_once(inputs, variant, chunk)
    seconds, clock_seconds = time.process_time() - processor, time.perf_counter() - clock
    extra = memory_kib("VmHWM") - before
    return {
        "extra_mib": extra / 1024,
        "seconds": seconds,
        "clock_seconds": clock_seconds,
        "loss": loss,
        "gradient_norms": norms_of(gradients),
    }


def norms_of(gradients: Sequence[Tensor]) -> list[float]:
    """Theirs, in fp64."""
    return [float(g.double().norm()) for g in gradients]


def measure_on_gpu(inputs: Inputs, variant: str, chunk: int) -> dict[str, Any]:
    """As `measure_here`: what the allocator held at most, and the clock of what came to an end."""
    for _ in range(2):
        run_once(inputs, variant, chunk)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(GPU_REPETITIONS):
        gradients: list[Tensor] = []
        torch.cuda.synchronize()
        began = time.perf_counter()
        loss, gradients = run_once(inputs, variant, chunk)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    extra, seconds = torch.cuda.max_memory_allocated() - before, statistics.median(times)
    return {
        "extra_mib": extra / 2**20,
        "seconds": seconds,
        "clock_seconds": seconds,
        "loss": loss,
        "gradient_norms": norms_of(gradients),
    }


def measure(case: Case, variant: str, chunk: int, number: int, journal: Path | None) -> dict[str, Any]:
    """Run a case in a process of its own, unless the journal has it."""
    job = json.dumps({"case": asdict(case), "variant": variant, "chunk": chunk, "round": number})
    if journal is not None and journal.exists():
        for line in map(json.loads, journal.read_text(encoding="utf-8").splitlines()):
            if line["job"] == job:
                return dict(line["result"])
    if case.device != "cpu":  # whose allocator counts what this process holds, whatever held it before
        return measure_here(case, variant, chunk)
    done = subprocess.run([sys.executable, __file__, "--child", job], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{variant} of {case} ended with {done.returncode}: {done.stderr[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    if journal is not None:
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"job": job, "result": result}) + "\n")
    return result


def compare(case: Case, variants: Sequence[str], chunk: int, rounds: int, journal: Path | None) -> dict[str, Any]:
    """All variants of a case, in rounds, so that a bad minute of the machine does not hit one alone."""
    found: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for variant in variants:
            result = measure(case, variant, chunk, number, journal)
            if variant in found:
                result["seconds"] = min(result["seconds"], found[variant]["seconds"])
                result["extra_mib"] = max(result["extra_mib"], found[variant]["extra_mib"])
            found[variant] = result
    row = {**asdict(case), "variants": found}
    if "own" in found and "naive" in found:
        row["saving"] = found["naive"]["extra_mib"] / found["own"]["extra_mib"]
    if "own" in found and (others := [v for v in variants if v in OTHERS]):
        row["fastest_alternative"] = min(others, key=lambda v: found[v]["seconds"])
        row["slowdown"] = found["own"]["seconds"] / found[row["fastest_alternative"]]["seconds"]
    return row


def show(row: dict[str, Any]) -> str:
    """A case as lines for people."""
    title = (
        f"V = {row['vocabulary']:,}, M = {row['tokens']:,}, H = {row['hidden_size']}, {row['dtype']}, {row['trained']}"
    )
    lines = [
        f"  {name:<28} {r['extra_mib']:>8.0f} MiB {r['seconds']:>8.4f} s   loss {r['loss']:.6f}"
        for name, r in row["variants"].items()
    ]
    if "saving" in row:
        lines.append(f"  naive takes {row['saving']:.1f}x the memory of own")
    if "slowdown" in row:
        lines.append(f"  own takes {row['slowdown']:.2f}x the time of {row['fastest_alternative']}")
    return "\n".join([title, *lines])


def judge(cases: Sequence[dict[str, Any]]) -> bool | None:
    """Say which targets were missed; None where what was run does not tell."""
    savings = [case.get("saving") for case in cases if case["vocabulary"] == 32_000]
    slowdowns = [case.get("slowdown") for case in cases]
    too_big = sum(saving is not None and saving < LEAST_SAVING for saving in savings)
    too_slow = sum(slowdown is not None and slowdown > MOST_SLOWDOWN for slowdown in slowdowns)
    unknown = savings.count(None) + slowdowns.count(None)
    print(f"targets missed: memory in {too_big} cases, time in {too_slow}; not measured: {unknown}")
    if too_big or too_slow:
        return False
    return None if unknown else True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="write everything measured to this file")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs=2, default=(4096, 1024), help="for V = 32k and 152k")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens at a time at most, of the own loss")
    parser.add_argument("--rounds", type=int, default=1, help="processes per variant")
    parser.add_argument("--trained", nargs="+", choices=["all", "gate"], default=["all", "gate"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=[*ON_CPU])
    parser.add_argument("--device", default="cpu", help="cuda for a GPU")
    parser.add_argument("--journal", type=Path, default=None, help="keep measurements here, to go on after a stop")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        job = json.loads(arguments.child)
        print(json.dumps(measure_here(Case(**job["case"]), job["variant"], job["chunk"])))
        return
    report: dict[str, Any] = {"run": describe_run(), "chunk": arguments.chunk, "cases": []}
    for trained in arguments.trained:
        for vocabulary, tokens in zip((32_000, 152_064), arguments.tokens, strict=True):
            for dtype in arguments.dtypes:
                case = Case(vocabulary, tokens, arguments.hidden_size, dtype, trained, arguments.device)
                row = compare(case, arguments.variants, arguments.chunk, arguments.rounds, arguments.journal)
                report["cases"].append(row)
                print(show(row), flush=True)
    report["reached"] = judge(report["cases"])
    if arguments.json is not None:
        write_text_atomically(json.dumps(report, indent=1) + "\n", arguments.json)


if __name__ == "__main__":
    main()
