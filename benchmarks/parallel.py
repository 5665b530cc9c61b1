"""What the two ways of training in several processes send, and how long a step takes, on gloo and on paper.

`fsdp` cuts all specialists among all processes; `specialist` gives each specialist a group of processes, and they send
logits instead of weights. Small Llamas with random weights take steps of stage 2 in one process, then in 3 and 6 by
both ways, from the same weights on the same batch: the losses must agree. Of one step everything handed to a collective
is counted, and beside it stand what arithmetic says and what the kernel counted on the loopback device (everything that
this machine sends to itself). On paper: three times Llama 2 13B on 8 and 16 GPUs.

Bytes are those that one process sends in a step, by ring algorithms: (g - 1) / g of what is gathered or scattered among
g processes, twice that of what is summed in all.

Example: OMP_NUM_THREADS=1 python benchmarks/parallel.py --json docs/results/parallel.json
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from ultrafuser.config.training import ParallelConfig, StageConfig
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.provenance import describe_run
from ultrafuser.train.optimizer import NamedAdamW, is_gate
from ultrafuser.train.parallel.fsdp import FullyShard
from ultrafuser.train.parallel.single import Single
from ultrafuser.train.parallel.specialist import SpecialistParallel
from ultrafuser.train.parallel.strategy import Strategy
from ultrafuser.train.parallel.world import World, begin_world
from ultrafuser.train.phase import choose_parameters

FP32, BF16 = 4, 2
NAMES = ("text", "code", "math")
# Of each collective: how often everything goes round, and which argument is everything.
RINGS = {"allreduce_": (2, 0), "allgather_": (1, 0), "_allgather_base_": (1, 0), "_reduce_scatter_base_": (1, 1)}
# GPUs that are there, mode, and how many of them it uses: a multiple of 3 where each specialist gets as many.
PAPER = ((8, "fsdp", 8), (8, "specialist", 6), (9, "specialist", 9), (16, "fsdp", 16), (16, "specialist", 15))
MOST_DIFFERENCE = 1e-4  # of a loss, from that of one process


@dataclass(frozen=True)
class Shape:
    """Size of one specialist.

    Attributes:
        layers: Parameters of all decoder layers.
        ends: Of embedding and of head, each.
        norm: Of the last norm.
        vocabulary: V.
    """

    layers: int
    ends: int
    norm: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers + 2 * self.ends + self.norm


@dataclass(frozen=True)
class Plan:
    """One way to train n specialists for a step.

    Attributes:
        mode: fsdp, specialist.
        processes: That compute.
        passes: Forward and backward passes of each.
        tokens: Response tokens of each.
        layer_bytes: Per number of a decoder layer that travels.
        gate: Parameters of the gate.
    """

    mode: str
    processes: int
    passes: int
    tokens: int
    layer_bytes: int
    gate: int


def sent_bytes(shape: Shape, plan: Plan) -> dict[str, float]:
    """What one process sends in a step of stage 2.

    Weights: decoder layers, embedding and gate are gathered for the forward pass and again for the backward pass, head
    and last norm once. Gradients are fp32 and scattered after every pass. Logits are summed in fp32 among the n
    processes that run the same records, and each tells the others a score and a gradient per token.
    """
    n = len(NAMES)
    by_specialist = plan.mode == "specialist"
    held = 1 if by_specialist else n  # specialists that a process takes part in
    sharing = plan.processes // n if by_specialist else plan.processes
    cut = (sharing - 1) / sharing
    weights = held * (2 * shape.layers * plan.layer_bytes + (3 * shape.ends + shape.norm) * FP32) + 2 * plan.gate * FP32
    gradients = (held * shape.parameters + plan.gate) * FP32
    found = {"weights": cut * plan.passes * weights, "gradients": cut * plan.passes * gradients, "logits": 0.0}
    if by_specialist:
        summed = 2 * (n - 1) / n
        scores = 2 * (n - 1) * plan.tokens * FP32
        found["logits"] = summed * (plan.tokens * shape.vocabulary + plan.gate / sharing) * FP32 + scores
    return found | {"total": sum(found.values())}


# --- on paper


def on_paper() -> dict[str, Any]:
    """Three times Llama 2 13B: bytes that each GPU sends in a step, and its state, by mode and number of GPUs."""
    hidden, inner, layers, vocabulary = 5120, 13824, 40, 32_000
    shape = Shape(layers * (4 * hidden**2 + 3 * hidden * inner + 2 * hidden), hidden * vocabulary, hidden, vocabulary)
    records, columns, response = 96, 600, 450
    most_columns = 16_384  # train.micro_batch_tokens
    gate = hidden * 512 + 512 + 512 + 1
    rows = []
    for gpus, mode, used in PAPER:
        parts = used if mode == "fsdp" else used // len(NAMES)
        own = records / parts
        passes = -(-own * columns // most_columns)
        plan = Plan(mode, used, int(passes), round(own * response), BF16, gate)
        held = len(NAMES) * shape.parameters / used
        sent = {part: round(value / 1e9, 1) for part, value in sent_bytes(shape, plan).items()}
        rows.append(asdict(plan) | {"gpus": gpus, "idle": gpus - used, "sent_gb": sent, "state_gb": held * 16 / 1e9})
    return {
        "model": "3 x Llama 2 13B",
        "parameters": len(NAMES) * shape.parameters,
        "batch": {"records": records, "columns": columns, "response_tokens": response, "columns_a_pass": most_columns},
        "state": "16 bytes a parameter: fp32 weight, gradient and two moments",
        "rows": rows,
    }


# --- on gloo


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is handed to collectives, as the bytes that this process sends by ring algorithms."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and go on."""
        if func.namespace == "c10d":
            size = next(dist.ProcessGroup.unbox(value).size() for value in args if _is_group(value))
            ring, name = (size - 1) / size, func.__name__.split(".")[0]
            factor, whole = RINGS[name]
            self.sent[name] = self.sent.get(name, 0.0) + factor * ring * _bytes(args[whole])
        return func(*args, **(kwargs or {}))


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


@dataclass(frozen=True)
class Options:
    """Sizes of models and batch."""

    hidden_size: int
    layers: int
    vocabulary: int
    rows: int
    columns: int
    steps: int

    @property
    def shape(self) -> Shape:
        """Of one specialist."""
        model = make_specialist(self, 0)
        layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
        ends = self.vocabulary * self.hidden_size
        return Shape(layers, ends, self.hidden_size, self.vocabulary)


def make_specialist(options: Options, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights; embedding and head are two."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden_size,
            intermediate_size=options.hidden_size * 11 // 4,
            num_hidden_layers=options.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        )
    )


def make_batch(options: Options) -> dict[str, Tensor]:
    """The whole batch: half of the columns are response, and half of those prompts differ between specialists."""
    torch.manual_seed(0)
    ids = torch.randint(0, options.vocabulary, (options.rows, options.columns))
    views = ids[:, None].repeat(1, len(NAMES), 1)
    start = options.columns // 2
    views[:, :, :start] = torch.randint(0, options.vocabulary, (options.rows, len(NAMES), start))
    labels = ids.clone()
    labels[:, :start] = -100
    return {"labels": labels, "specialist_input_ids": views, "specialist_attention_mask": torch.ones_like(views)}


def make_strategy(mode: str, world: World) -> tuple[Strategy, int, int]:
    """The strategy, which part of the batch this process runs, and of how many."""
    if mode == "single":
        return Single(world), 0, 1
    if mode == "fsdp":
        return FullyShard(world, ParallelConfig(), bf16=False), world.rank, world.size
    strategy = SpecialistParallel(world, ParallelConfig(mode="specialist"), num_specialists=len(NAMES), bf16=False)
    return strategy, strategy.column, strategy.num_columns


def measure(mode: str, world: World, options: Options) -> dict[str, Any]:
    """Losses, seconds and bytes of steps of stage 2, as this process sees them."""
    model: Any = FusedForCausalLM.from_specialists({n: make_specialist(options, i) for i, n in enumerate(NAMES)})
    strategy, part, parts = make_strategy(mode, world)
    trained = strategy.prepare(model, choose_parameters(model, train_specialists=True))
    gate = sum(p.numel() for name, p in model.named_parameters() if is_gate(name))
    optimizer = NamedAdamW(trained, StageConfig(train_specialists=True, learning_rate=1e-3, schedule="constant"))
    batch = {name: tensor[part::parts] for name, tensor in make_batch(options).items()}
    tokens = options.rows * (options.columns - options.columns // 2)
    copies = world.size // parts  # processes that find the same loss
    losses: list[float] = []

    def step() -> None:
        nll, _ = strategy.response_nll(model, batch)
        (nll.sum() / tokens * strategy.loss_scale).backward()  # type: ignore[no-untyped-call]
        strategy.clip(trained, 1.0)
        optimizer.step(len(losses))
        losses.append(float(world.add_up(nll.detach().double().sum()[None]) / copies / tokens))

    model.train()
    seconds = [_timed(step, world) for _ in range(options.steps)]
    traffic = Traffic()
    before = loopback_bytes()
    with traffic:
        step()
    world.barrier()
    plan = Plan(mode, world.size, 1, tokens // parts, FP32, gate)
    return {
        "losses": losses,
        "seconds": statistics.median(seconds[1:] or seconds),
        "counted": traffic.sent,
        "counted_bytes": sum(traffic.sent.values()),
        "paper": {} if mode == "single" else sent_bytes(options.shape, plan),
        "loopback_bytes": loopback_bytes() - before,
        "held_parameters": sum(_local(p) for p in trained.values()),
    }


def _timed(step: Callable[[], None], world: World) -> float:
    world.barrier()
    began = time.perf_counter()
    step()
    world.barrier()
    return time.perf_counter() - began


def _local(parameter: Any) -> int:
    return int((parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel())


def loopback_bytes() -> int:
    """What this machine has sent to itself since it started, headers included."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[8])


def run_processes(size: int, modes: Sequence[str], options: Options) -> list[dict[str, Any]]:
    """Fork the processes of a run; a row for each mode."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        children = []
        for rank in range(size):
            if (child := os.fork()) == 0:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
                _run_child(Path(folder) / f"{rank}.json", modes, options)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            raise SystemExit(f"of {size} processes some failed: {codes}")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]
    return [_row(mode, size, [one[mode] for one in found]) for mode in modes]


def _run_child(file: Path, modes: Sequence[str], options: Options) -> None:
    """A forked process ends here, and not in what its parent would do next."""
    try:
        with begin_world("cpu", timeout_s=300.0) as world:
            found = {mode: measure(mode, world, options) for mode in modes}
        file.write_text(json.dumps(found), encoding="utf-8")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _row(mode: str, size: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all processes the one that sends, waits and holds most."""
    most = max(found, key=lambda one: one["counted_bytes"])
    return {
        "mode": mode,
        "processes": size,
        **most,
        "seconds": max(one["seconds"] for one in found),
        "loopback_bytes_a_process": found[0]["loopback_bytes"] / size,
        "held_parameters": max(one["held_parameters"] for one in found),
    }


def show(row: dict[str, Any]) -> str:
    """A row as a line for people."""
    return (
        f"{row['mode']:<11} {row['processes']} processes  {row['seconds']:7.3f} s a step   sent "
        f"{row['counted_bytes'] / 1e6:8.1f} MB (on paper {row['paper'].get('total', 0.0) / 1e6:8.1f}; loopback "
        f"{row['loopback_bytes_a_process'] / 1e6:8.1f})   loss {row['losses'][-1]:.6f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="write everything measured to this file")
    parser.add_argument("--processes", type=int, nargs="+", default=[3, 6], help="multiples of 3")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=12, help="of the batch; a multiple of the processes")
    parser.add_argument("--columns", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as every process has; threads started here would not survive the fork
    values = {name: getattr(arguments, name) for name in Options.__dataclass_fields__}
    options = Options(**values)
    if bad := [size for size in arguments.processes if size % len(NAMES) or options.rows % size]:
        raise SystemExit(
            f"{bad[0]} processes: neither 3 specialists nor {options.rows} rows can be dealt to them evenly"
        )
    rows = run_processes(1, ["single"], options)
    for size in arguments.processes:
        rows += run_processes(size, ["fsdp", "specialist"], options)
    for row in rows:
        print(show(row), flush=True)
    paper = on_paper()
    for row in paper["rows"]:
        place = f"{row['gpus']} GPUs, {row['mode']} on {row['processes']}"
        print(f"{paper['model']}, {place}: {row['sent_gb']} GB a step, {row['state_gb']:.0f} GB of state")
    report = {"run": describe_run(), "options": asdict(options), "parameters": len(NAMES) * options.shape.parameters}
    report |= {"rows": rows, "on_paper": paper}
    worst = max(abs(a / b - 1) for row in rows for a, b in zip(row["losses"], rows[0]["losses"], strict=True))
    report["loss_difference"] = worst
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if worst > MOST_DIFFERENCE:
        raise SystemExit(f"losses differ from those of one process by up to {worst:.1e} of their value")


if __name__ == "__main__":
    main()
