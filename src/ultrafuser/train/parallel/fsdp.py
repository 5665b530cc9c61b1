"""Every process holds a part of every weight: torch's FSDP2 under the loop (`parallel.mode: fsdp`).

A unit is what is gathered, used and let go of together: each decoder layer, each embedding, each head, the gate; the
rest (last norms, and embeddings tied to a head, which are needed from first to last) belongs to the root. The loss
reads heads as tensors, so they are gathered where it asks for them and stay until its backward pass has reduced their
gradients.

bf16 means what it means in one process: autocast over fp32 masters. Decoder layers travel as bf16, gate, embeddings and
heads as fp32; gradients are summed in fp32.

Shapes: M response tokens, N specialists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from ultrafuser.alignment.encode import EncodedRecord
from ultrafuser.config.training import ParallelConfig
from ultrafuser.model.backbone import linear_head
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.loss import Head, LinearHead
from ultrafuser.train.parallel.deal import deal
from ultrafuser.train.parallel.shards import clip_shards
from ultrafuser.train.parallel.strategy import Share
from ultrafuser.train.parallel.world import World
from ultrafuser.train.sums import Sums


class FullyShard:
    """The strategy of FSDP2; see `Strategy`.

    Args:
        world: At least two processes; their group has begun.
        parallel: Offloading, and whether frozen weights are shared out as well.
        bf16: Compute under autocast, and send decoder layers as bf16.
        mesh: The processes that share the weights; None: all.
    """

    def __init__(self, world: World, parallel: ParallelConfig, *, bf16: bool, mesh: DeviceMesh | None = None) -> None:
        self._world, self.parallel = world, parallel
        self.mesh = mesh if mesh is not None else init_device_mesh(world.device.type, (world.size,))
        self._exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        self._layers = MixedPrecisionPolicy(torch.bfloat16, torch.float32, None, False) if bf16 else self._exact

    @property
    def world(self) -> World:
        """The processes."""
        return self._world

    @property
    def loss_scale(self) -> float:
        """FSDP2 takes the mean of the processes' gradients, and the loss is a sum: so it is scaled by their number.

        Its own `set_gradient_divide_factor` is no way out: gloo refuses it, and NCCL gives zeros in bf16.
        """
        return float(self._world.size)

    def loads(self, names: Sequence[str]) -> Sequence[str]:
        """All of them."""
        return names

    def prepare(self, model: FusedForCausalLM, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Cut every weight; each unit goes to the device as it is cut, so the whole model need not fit there."""
        ignored = set()
        if self.parallel.replicate_frozen:
            ignored = {parameter for parameter in model.parameters() if not parameter.requires_grad}
            for parameter in ignored:
                parameter.data = parameter.data.to(self._world.device)
        heads = {name: _UnitHead(model.specialists[name]) for name in model.active_names}
        for module in _units(model):
            is_layer = module not in (model.fusion_gate, *(head.layer for head in heads.values()))
            self._shard(module, self._layers if is_layer and not _is_embedding(module) else self._exact, ignored)
        self._shard(model, self._exact, ignored)
        register_fsdp_forward_method(model, "response_nll")
        whole = model.loss_head
        model.loss_head = lambda name: heads[name].gathered() or whole(name)  # type: ignore[method-assign]
        now = dict(model.named_parameters())
        return {name: now[name] for name in trained}

    def _shard(self, module: nn.Module, policy: MixedPrecisionPolicy, ignored: set[nn.Parameter]) -> None:
        offload = OffloadPolicy()
        if self.parallel.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self._world.device.type == "cuda")
        is_head = isinstance(module, nn.Linear)
        fully_shard(
            module,
            mesh=self.mesh,
            mp_policy=policy,
            offload_policy=offload,
            ignored_params=ignored,
            reshard_after_forward=False if is_head else None,
        )

    def deal(self, records: Sequence[EncodedRecord], *, max_columns: int) -> list[Share]:
        """A part of the batch for each process."""
        return deal(records, parts=self._world.size, part=self._world.rank, max_columns=max_columns)

    def response_nll(
        self, model: FusedForCausalLM, batch: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, "M N"]]:
        """The model's own, which gathers what it needs."""
        nll, weights, _ = model.response_nll(**batch)
        return nll, weights

    def clip(self, trained: Mapping[str, nn.Parameter], max_norm: float | None) -> float:
        """Over the parts of all processes."""
        return clip_shards(trained.values(), max_norm, add_up=self._world.add_up)

    def add_up(self, sums: Sums, *, domains: Sequence[str], num_specialists: int) -> Sums:
        """Every process has run records of its own."""
        return sums.over(self._world.add_up, domains=domains, num_specialists=num_specialists)


class _UnitHead:
    """A head that is a unit of its own, for a loss that reads its tensors and never calls it."""

    def __init__(self, specialist: Any) -> None:
        self.layer: Any = specialist.get_output_embeddings()
        self._whole = linear_head(specialist)
        self._is_unit = not _is_tied(specialist)

    def gathered(self) -> Head | None:
        """The head whole; None where calling it does more than a linear layer, and gathers it."""
        if self._whole is None:
            return None
        if self._is_unit and hasattr(self.layer, "unshard"):
            self.layer.unshard()
        return LinearHead(self.layer.weight, self.layer.bias, self._whole.scale)


def _units(model: FusedForCausalLM) -> Iterator[nn.Module]:
    """Everything that is a unit below the root."""
    for specialist in (model.specialists[name] for name in model.active_names):
        yield from decoder_layers(specialist)
        if not _is_tied(specialist):
            yield specialist.get_input_embeddings()
            yield specialist.get_output_embeddings()
    if any(True for _ in model.fusion_gate.parameters()):
        yield model.fusion_gate


def decoder_layers(specialist: Any) -> list[nn.Module]:
    """The layers that transformers says must not be split; where it says none, those of the longest list of modules."""
    names = set(getattr(specialist, "_no_split_modules", None) or ())
    if layers := [module for module in specialist.modules() if type(module).__name__ in names]:
        return [
            layer for layer in layers if not any(layer in other.modules() for other in layers if other is not layer)
        ]
    lists = [module for module in specialist.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda modules: len(list(modules)), default=nn.ModuleList()))


def _is_tied(specialist: Any) -> bool:
    return specialist.get_input_embeddings().weight is specialist.get_output_embeddings().weight


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)
