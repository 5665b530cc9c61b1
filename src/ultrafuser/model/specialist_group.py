"""Processes that hold one specialist each and compute one loss together.

Every process of a group sees the same tokens and ends with the same loss. What it must hear of the others is one score
per token, the sum of the weighted logits, and one number per token for the gradient of the weights; hidden states,
heads and their gradients stay where they are.

The loss is computed on every process but counts once. Where torch's own collectives would add up the gradients of all
copies, these two functions give each process its part: the gradient of what it put in.

Shapes: M tokens, C of them in a chunk, N specialists, H hidden size, V vocabulary, W of it in a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultrafuser.model.linear_loss import linear_loss
from ultrafuser.model.loss import LinearHead, TokenLoss


@dataclass(frozen=True, slots=True)
class SpecialistGroup:
    """The processes of a group, in the order of the specialists.

    Attributes:
        processes: As torch.distributed knows them.
        index: Which of the specialists this process holds.
        size: N.
    """

    processes: dist.ProcessGroup
    index: int
    size: int

    def gather_scores(self, own: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows N"]:
        """Scores of all specialists from those of each; a gradient comes back to its own."""
        gathered: Tensor = _GatherColumns.apply(own, self)  # type: ignore[no-untyped-call]
        return gathered

    def own_weights(self, weights: Float[Tensor, "M N"]) -> Float[Tensor, "M 1"]:
        """This process's column of weights that all hold; their gradient is made of what each has for its own."""
        column: Tensor = _OwnColumn.apply(weights, self)  # type: ignore[no-untyped-call]
        return column

    def add_others(self, logits: Float[Tensor, "C W"]) -> None:
        """Make each specialist's weighted logits their sum, in place; the same to the bit on every process."""
        if logits.numel():
            dist.all_reduce(logits, group=self.processes)

    def gather(self, own: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows N"]:
        """One column from each process, without a gradient."""
        everybody = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        if own.numel():
            dist.all_gather(everybody, own.detach().contiguous(), group=self.processes)
        return torch.stack(everybody, dim=-1)


def group_loss(
    hidden: Float[Tensor, "M H"],
    weights: Float[Tensor, "M N"],
    labels: Int[Tensor, " M"],
    head: LinearHead,
    group: SpecialistGroup,
    *,
    vocabulary: int,
    chunk: int = 1024,
    details: bool = False,
) -> TokenLoss:
    """`fused_loss` of linear heads, called on every process of a group with the hidden states and head of its own.

    Args:
        hidden: Last hidden states of this process's specialist.
        weights: Gate weights of all specialists, the same everywhere.
        labels: Token that each row predicts, the same everywhere.
        head: Of this process's specialist; whole, not a shard.
        group: The processes.
        vocabulary: V, rows that all heads have.
        chunk: Tokens whose logits are held, and added over processes, at once, at most.
        details: Also give `hit` and `specialist_nll`.

    Returns:
        The same on every process. Gradients of `hidden`, `head` and its bias are those of the whole loss; that of
        `weights`, too, whole on every process.
    """
    scaled = hidden if head.scale == 1.0 else hidden * head.scale
    bias = head.bias if head.bias is None or head.scale == 1.0 else head.bias * head.scale
    weight = head.weight
    if len(weight) > vocabulary:  # cutting costs a copy of the gradient
        weight, bias = weight[:vocabulary], bias if bias is None else bias[:vocabulary]
    nll, hit, own_nll = linear_loss(
        group.own_weights(weights),
        labels,
        [scaled],
        [weight],
        [bias],
        chunk=chunk,
        details=details,
        add_others=group.add_others,
    )
    return TokenLoss(nll, hit, group.gather(own_nll[:, 0])) if details else TokenLoss(nll)


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: SpecialistGroup) -> Tensor:
        ctx.group = group
        return group.gather(own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope[..., ctx.group.index], None


class _OwnColumn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, group: SpecialistGroup) -> Tensor:
        ctx.group = group
        return weights[:, group.index, None].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return ctx.group.gather(slope[:, 0]), None
