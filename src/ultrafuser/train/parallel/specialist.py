"""A group of processes for each specialist: what travels is logits, and no specialist's weights (`mode: specialist`).

The processes form a table of n rows. Those of row i hold specialist i alone, whole or cut among them by FSDP2; those of
one column run the same records, each its own specialist, and add up their weighted logits chunk by chunk
(`model/specialist_group.py`). Columns run different records, as the processes of `mode: fsdp` do.

    row 0   text  text        All hold the gate and end with the same one: the gradient of its scores is there for
    row 1   code  code        each row's own specialist, and is summed over the rows.
    row 2   math  math

Shapes: M response tokens, N specialists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ultrafuser.alignment.encode import EncodedRecord
from ultrafuser.config.training import ParallelConfig
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.fused_rank import FusedRank
from ultrafuser.model.specialist_group import SpecialistGroup
from ultrafuser.train.optimizer import is_gate
from ultrafuser.train.parallel.deal import deal
from ultrafuser.train.parallel.fsdp import FullyShard
from ultrafuser.train.parallel.shards import clip_shards, local
from ultrafuser.train.parallel.strategy import Share
from ultrafuser.train.parallel.world import World
from ultrafuser.train.sums import Sums


class SpecialistParallel:
    """The strategy of a group for each specialist; see `Strategy`.

    Args:
        world: As many processes as `check_specialist_mode` lets pass; their group has begun.
        parallel: As in the recipe.
        num_specialists: N.
        bf16: Compute under autocast, and send decoder layers as bf16.
    """

    def __init__(self, world: World, parallel: ParallelConfig, *, num_specialists: int, bf16: bool) -> None:
        self._world = world
        self.num_columns = world.size // num_specialists
        mesh = init_device_mesh(
            world.device.type, (num_specialists, self.num_columns), mesh_dim_names=("specialist", "fsdp")
        )
        self.group = SpecialistGroup(
            mesh.get_group("specialist"), int(mesh.get_local_rank("specialist")), num_specialists
        )
        self.column = int(mesh.get_local_rank("fsdp"))
        self._row = FullyShard(world, parallel, bf16=bf16, mesh=mesh["fsdp"]) if self.num_columns > 1 else None
        self._part: FusedRank | None = None

    @property
    def world(self) -> World:
        """The processes."""
        return self._world

    @property
    def loss_scale(self) -> float:
        """FSDP2 takes the mean of a row's gradients; see `FullyShard.loss_scale`."""
        return float(self.num_columns)

    def loads(self, names: Sequence[str]) -> Sequence[str]:
        """That of the row."""
        return [names[self.group.index]]

    def prepare(self, model: FusedForCausalLM, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Keep one specialist and the gate, and cut them among the processes of the row."""
        self._part = part = FusedRank.of(model, self.group)
        if self._row is not None:
            self._row.prepare(part, {})
        else:
            part.to(self._world.device)  # type: ignore[arg-type]
        now = dict(part.named_parameters())
        return {name: now[name] for name in trained if name in now}

    def deal(self, records: Sequence[EncodedRecord], *, max_columns: int) -> list[Share]:
        """A part of the batch for each column."""
        return deal(records, parts=self.num_columns, part=self.column, max_columns=max_columns)

    def response_nll(
        self, model: FusedForCausalLM, batch: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, "M N"]]:
        """Together with the other processes of the column; the same in all of them."""
        assert self._part is not None, "prepare comes first"
        self._part.loss_chunk = model.loss_chunk
        nll, weights, _ = self._part.response_nll(**batch)
        return nll, weights

    def clip(self, trained: Mapping[str, nn.Parameter], max_norm: float | None) -> float:
        """Sum the gate's gradient over the rows; then over the parts of all processes, the gate counted once."""
        gate = [parameter for name, parameter in trained.items() if is_gate(name)]
        self._sum_over_rows(gate)
        copies = gate if self.group.index > 0 else ()
        return clip_shards(trained.values(), max_norm, add_up=self._world.add_up, copies=copies)

    def _sum_over_rows(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients in one exchange, where all rows hold the same parts."""
        if not parameters:
            return
        for parameter in parameters:
            if parameter.grad is None:  # the projection of another specialist
                parameter.grad = torch.zeros_like(parameter)
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        total = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(total, group=self.group.processes)
        for gradient, values in zip(gradients, torch.split(total, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(values.view_as(gradient))

    def add_up(self, sums: Sums, *, domains: Sequence[str], num_specialists: int) -> Sums:
        """Every column has run records of its own, and its processes found the same: the first one's count."""
        counted = sums if self.group.index == 0 else Sums()
        return counted.over(self._world.add_up, domains=domains, num_specialists=num_specialists)
