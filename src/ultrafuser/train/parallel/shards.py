"""Gradients that lie in parts in several processes: their norm, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def clip_shards(
    parameters: Iterable[nn.Parameter],
    max_norm: float | None,
    *,
    add_up: Callable[[Tensor], Tensor],
    copies: Iterable[nn.Parameter] = (),
) -> float:
    """Scale gradients to a norm of at most `max_norm`, in place.

    Args:
        parameters: Those that are trained.
        max_norm: None: leave them as they are.
        add_up: Sums a tensor on the CPU over the processes.
        copies: Those of the parameters that another process holds, too, and counts; every other element is in one
            process alone.

    Returns:
        The norm of the whole gradient before.
    """
    uncounted = {id(parameter) for parameter in copies}
    counted = [(local(p.grad), id(p) not in uncounted) for p in parameters if p.grad is not None]
    gradients = [gradient for gradient, _ in counted]
    own = [gradient for gradient, counts in counted if counts]
    squares = sum((float(norm) ** 2 for norm in torch._foreach_norm(own)), 0.0) if own else 0.0
    norm = math.sqrt(float(add_up(torch.tensor([squares], dtype=torch.float64))))
    if max_norm is not None and gradients:
        torch._foreach_mul_(gradients, min(1.0, max_norm / (norm + 1e-6)))
    return norm


def local(tensor: Tensor) -> Tensor:
    """This process's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
