"""A rank of a small FSDP2 run for `test_loss_training.py`: python fsdp_loss_ranks.py RANK NUM_RANKS FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from training_helpers import make_fused, make_phase
from ultrafuser.alignment.collate import collate
from ultrafuser.train.phase import choose_parameters


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Norm and sum of every gradient of the mean loss, whole again where it was sharded."""
    nll, _, _ = model.response_nll(**batch)
    nll.mean().backward()
    whole = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in named(model)}
    return {name: [float(g.norm()), float(g.sum())] for name, g in whole.items()} | {"loss": [float(nll.mean())]}


def named(model: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in model.named_parameters() if p.grad is not None]


def main(rank: int, num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_ranks)
    found: dict[str, Any] = {}
    for name, everything in (("stage1", False), ("stage2", True)):
        phase = make_phase(folder, model=make_fused())
        batch = collate([records[0] for records in phase.records.values()], pad_id=0).tensors()
        choose_parameters(phase.model, train_specialists=everything)
        found[name] = {"alone": gradients(phase.model, batch)}
        phase.model.zero_grad()
        for specialist in phase.model.specialists.values():
            for layer in specialist.base_model.layers:
                fully_shard(layer)
        fully_shard(phase.model)
        register_fsdp_forward_method(phase.model, "response_nll")
        found[name]["sharded"] = gradients(phase.model, batch)
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
