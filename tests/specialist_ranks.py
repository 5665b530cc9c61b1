"""Trains in a group of processes for each specialist, for test_training_specialist.py.

python tests/specialist_ranks.py FOLDER 3 6 recipe:3 bench:3 imports once and forks as many processes as a number says:
for the phases below, for the recipe of the folder, for a step of the benchmark.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from forking import fork
from training_helpers import TOKENIZER, make_fused, make_phase, make_specialist, write_ingredients
from ultrafuser.alignment.collate import collate
from ultrafuser.config.load import load_recipe
from ultrafuser.config.training import ParallelConfig
from ultrafuser.errors import UltrafuserError
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.fused_rank import FusedRank
from ultrafuser.model.specialist_group import SpecialistGroup
from ultrafuser.train import pipeline
from ultrafuser.train.loop import Loop
from ultrafuser.train.parallel.specialist import SpecialistParallel
from ultrafuser.train.parallel.world import World, begin_world
from ultrafuser.train.phase import Phase, choose_parameters

NAMES = ("text", "code", "math")
STAGES: dict[str, dict[str, Any]] = {
    "stage1": {"gate_entropy": 0.05},
    "stage2": {"train_specialists": True, "gate_learning_rate": 2e-2, "max_grad_norm": 0.5},
}


# The last bias of the gate moves all scores alike: its gradient is rounding, which Adam makes as large as any.
IRRELEVANT = "fusion_gate.layers.2.bias"
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "gate": ({}, False),
    "all": ({}, True),
    "unequal": ({}, True),
    "prompt": ({"granularity": "prompt"}, True),
    "uniform": ({"weighting": "uniform"}, True),
    "perplexity": ({"weighting": "perplexity"}, True),
}


def stage_phase(folder: Path, stage: str) -> Phase:
    """A phase of three specialists, whose batches are cut into several pieces and chunks.

    In stage 2 they are of two widths, so the gate has a projection for each, of which a process uses its own.
    """
    widths = dict(zip(NAMES, (16, 24, 16) if stage == "stage2" else (16, 16, 16), strict=True))
    specialists = {name: make_specialist(seed, hidden_size=widths[name]) for seed, name in enumerate(NAMES)}
    templates = ["ultralm", "codellama", "plain"]
    model = FusedForCausalLM.from_specialists(specialists, templates=templates, tokenizer=TOKENIZER, gate_hidden_size=8)
    train = {"micro_batch_tokens": 96, "loss_chunk": 7}
    return make_phase(folder / stage, model=model, name=stage, stage=STAGES[stage], train=train)


def train(folder: Path, world: World) -> dict[str, Any]:
    """Both stages; what this process holds afterwards."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        strategy = SpecialistParallel(world, ParallelConfig(mode="specialist"), num_specialists=len(NAMES), bf16=False)
        loop = Loop(stage_phase(folder, stage), strategy)
        loop.run()
        gate = [_whole(p) for name, p in loop.phase.model.named_parameters() if name.startswith("fusion_gate.")]
        found[stage] = {
            "gate": hashlib.sha256(b"".join(p.numpy().tobytes() for p in gate)).hexdigest(),
            "held": sorted({name.split(".")[1] for name in loop.trained if name.startswith("specialists.")}),
            "elements": sum(_local(p).numel() for p in loop.trained.values()),
        }
    return found


def compare(world: World) -> dict[str, Any]:
    """How far loss, details and gradients of a column are from those of one process; in parts of the whole value."""
    found: dict[str, Any] = {}
    for case, (options, everything) in CASES.items():
        whole, part = make_fused(NAMES, **options), make_fused(NAMES, **options)
        part = FusedRank.of(part, SpecialistGroup(dist.group.WORLD, world.rank, world.size))  # type: ignore[arg-type]
        phase = make_phase(Path(), model=whole)
        batch = collate([record for records in phase.records.values() for record in records[:2]], pad_id=0).tensors()
        outputs, gradients = [], []
        for model in (whole, part):
            model.loss_chunk = 7
            names = choose_parameters(model, train_specialists=everything)
            loss, weights, _ = model.response_loss(**batch, details=True)
            # Tokens that count differently: the gradients are then made anew in the backward pass.
            total = loss.nll.mean() + 0.1 * (weights * weights.log()).sum() + (loss.nll**2).mean() * (case == "unequal")
            total.backward()
            outputs.append([loss.nll.detach(), weights.detach(), loss.specialist_nll])
            assert loss.hit is not None
            gradients.append({name: parameter.grad for name, parameter in names.items()})
        for name, gradient in gradients[1].items():
            if gradient is not None and name.startswith("fusion_gate."):
                dist.all_reduce(gradient)
        pairs = [*zip(*outputs, strict=True)]
        pairs += [(gradients[0][name], own) for name, own in gradients[1].items() if name != IRRELEVANT]
        found[case] = {"worst": max(_difference(*pair) for pair in pairs), "gradients": len(gradients[1])}
    return found


def _difference(expected: torch.Tensor | None, actual: torch.Tensor | None) -> float:
    if expected is None or actual is None:
        return 0.0 if expected is actual else float("inf")
    return float((actual - expected).norm() / expected.norm())


def _whole(parameter: Any) -> torch.Tensor:
    value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return value.detach()  # type: ignore[no-any-return]


def _local(parameter: Any) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[no-any-return]


def write_recipe(folder: Path, **parallel: Any) -> Path:
    """Three specialists, the first one fine-tuned before, and both stages."""
    path = write_ingredients(folder)
    make_specialist(2).save_pretrained(folder / "math-base")
    TOKENIZER.save_pretrained(folder / "math-base")
    recipe = json.loads(path.read_text(encoding="utf-8"))
    recipe["specialists"]["math"] = {"model": "math-base", "template": "plain"}
    recipe["train"]["parallel"] = parallel
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def run_recipe(folder: Path, size: str) -> dict[str, Any]:
    """What a process of a run has to say: nothing, or why it was refused."""
    try:
        settings = [f"output={folder}/several-{size}", "train.parallel.mode=specialist"]
        pipeline.train(load_recipe(folder / "tiny.yaml", settings))
    except UltrafuserError as error:
        return {"refused": str(error)}
    return {"refused": None}


def load_benchmark() -> Any:
    """benchmarks/parallel.py as a module."""
    path = Path(__file__).parent.parent / "benchmarks" / "parallel.py"
    spec = importlib.util.spec_from_file_location("parallel_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_benchmark() -> dict[str, Any]:
    """One step by both modes; every size can be cut in three."""
    benchmark = load_benchmark()
    options = benchmark.Options(hidden_size=48, layers=2, vocabulary=96, rows=3, columns=16, steps=1)
    with begin_world("cpu", timeout_s=120.0) as world:
        return {mode: benchmark.measure(mode, world, options) for mode in ("fsdp", "specialist")}


def run_ranks(folder: Path, job: str) -> bool:
    """Fork the processes of one run; whether all ended well."""
    size = int(job.split(":")[-1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def be(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        run_job(folder, job, rank)

    children = [fork(partial(be, rank)) for rank in range(size)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes == [0] * size


def run_job(folder: Path, job: str, rank: int) -> None:
    """What one of the processes does."""
    if job.startswith("recipe:"):
        found = run_recipe(folder, job.removeprefix("recipe:"))
    elif job.startswith("bench:"):
        found = run_benchmark()
    else:
        with begin_world("cpu", timeout_s=120.0) as world:
            found = {"compare": compare(world)} if world.size == len(NAMES) else {}
            found |= train(folder / job, world)
    (folder / f"found-{job}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    ended_well = [run_ranks(Path(sys.argv[1]), job) for job in sys.argv[2:]]
    sys.exit(0 if all(ended_well) else 1)
