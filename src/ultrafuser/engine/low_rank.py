"""What adapters of n specialists add to one product of their shared base: scaling * B A x, each for its own rows.

All specialists' A are one matrix over all rows, so that there is one small product and not n: what it makes for the
ranks of others is arithmetic in vain, which decoding has to spare. Each B is multiplied by its own ranks. Ranks may
differ; nothing is filled up.

Shapes: G specialists, M rows of each, I inputs, O outputs, R ranks of all specialists and layers together.

Source of the update: Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ultrafuser.engine.few_rows import Adapters, Up
from ultrafuser.engine.narrow import keeps_values, multiply_narrow
from ultrafuser.engine.reduced import fits_fp16
from ultrafuser.engine.weights import AnyFormat
from ultrafuser.kernels.native import in_large_pages

_NAME = "default"  # of the adapter in each specialist


class Layer(NamedTuple):
    """An adapted layer of a product: outputs, ranks, which of these are each specialist's, and B [O, r] of each."""

    outputs: slice
    ranks: slice
    own: list[slice]
    linears: list[nn.Linear]


class Ranks(NamedTuple):
    """How the adapters of the layers of one product lie side by side: layer by layer, in each all specialists."""

    downs: list[nn.Linear]  # A [r, I] of each
    scales: Float[Tensor, " R"]
    layers: list[Layer]


def lay_out(parts: Sequence[Sequence[Any]]) -> Ranks:
    """The layout for layers whose outputs stand side by side, given per specialist; those without adapters are plain.

    At least one has an adapter.
    """
    downs: list[nn.Linear] = []
    scales: list[float] = []
    layers: list[Layer] = []
    start = 0
    for column in zip(*parts, strict=True):
        first, own, ups = len(scales), [], []
        for part in column:
            before = len(scales)
            if has_adapter(part):
                downs.append(part.lora_A[_NAME])
                ups.append(part.lora_B[_NAME])
                scales += [part.scaling[_NAME]] * downs[-1].out_features
            own.append(slice(before - first, len(scales) - first))
        stop = start + column[0].out_features
        if ups:
            layers.append(Layer(slice(start, stop), slice(first, len(scales)), own, ups))
        start = stop
    return Ranks(downs, torch.tensor(scales), layers)


class Arena:
    """One buffer for the adapters of a stack, in large pages: each is short, and read faster beside the others.

    Args:
        num_values: Of all.
    """

    def __init__(self, num_values: int) -> None:
        self.num_values = num_values
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}  # what is free

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """The next part, not filled, of the type and on the device of another tensor."""
        key, size = (like.dtype, like.device), math.prod(shape)
        if key not in self._buffers:
            self._buffers[key] = in_large_pages(torch.empty(self.num_values, dtype=like.dtype, device=like.device))
        taken, self._buffers[key] = self._buffers[key][:size], self._buffers[key][size:]
        return taken.view(*shape)


class LowRank:
    """Adapters of the layers of one product.

    Args:
        ranks: Of these layers.
        form: Format of the base's weights. Exact adapters keep their values, in 16 bits where such a product is fast,
            and become views of one buffer unless their type changes; beside reduced weights they are fp16, if they fit.
        compute_dtype: Of inputs and outputs.
        num_threads: Of torch.
        arena: Where they will be.
    """

    def __init__(
        self, ranks: Ranks, form: AnyFormat, compute_dtype: torch.dtype, *, num_threads: int, arena: Arena
    ) -> None:
        linears = [*ranks.downs, *(linear for layer in ranks.layers for linear in layer.linears)]
        self.num_threads = num_threads
        self.dtype = _kept_type([linear.weight for linear in linears], form, compute_dtype)
        self.copied = linears if self.dtype != linears[0].weight.dtype else []  # whose weights are not needed any more
        self.down = self._joined(ranks.downs, arena, dim=0)
        self.ups = [
            Up(layer.outputs, layer.ranks, layer.own, self._joined(layer.linears, arena, dim=1))
            for layer in ranks.layers
        ]
        self.scales = ranks.scales.to(self.down.device, compute_dtype)
        self.num_bytes = sum(m.numel() * m.element_size() for m in (self.down, *(up.weight for up in self.ups)))

    @property
    def adapters(self) -> Adapters:
        """As our own kernel reads them."""
        return Adapters(self.down, self.ups, self.scales)

    def add_to(self, y: Float[Tensor, "G M O"], x: Float[Tensor, "G M I"], member: int | None = None) -> None:
        """Add what the adapters say of `x`, in place; with `member` both have one specialist."""
        lowered = self._times(x.reshape(-1, x.shape[-1]), self.down).view(*x.shape[:2], -1) * self.scales
        for outputs, ranks, own, weight in self.ups:
            weight, shares = weight.to(x.dtype), lowered[..., ranks]
            if member is None and len({part.stop - part.start for part in own}) == 1:
                every = shares.view(*x.shape[:2], len(own), -1)
                mine = every.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [G, M, r]: of each its own ranks
                y[..., outputs].add_(torch.bmm(mine, weight.view(len(weight), len(own), -1).permute(1, 2, 0)))
                continue
            for rows, these, j in zip(y, shares, range(len(own)) if member is None else (member,), strict=True):
                if own[j].start < own[j].stop:
                    rows[:, outputs].add_(these[:, own[j]] @ weight[:, own[j]].t())

    def _times(self, x: Tensor, matrix: Tensor) -> Tensor:
        if matrix.dtype == x.dtype:
            return x @ matrix.t()
        return multiply_narrow(x[None], matrix[None], num_threads=self.num_threads)[0]

    def _joined(self, linears: Sequence[nn.Linear], arena: Arena, *, dim: int) -> Tensor:
        """Weights of layers, one below the other or side by side."""
        parts = [linear.weight.detach().to(self.dtype) for linear in linears]
        shape = list(parts[0].shape)
        shape[dim] = sum(part.shape[dim] for part in parts)
        weight = torch.cat(parts, dim=dim, out=arena.take(shape, parts[0]))
        if not self.copied:
            for linear, view in zip(
                linears, torch.split(weight, [part.shape[dim] for part in parts], dim), strict=True
            ):
                linear.weight.data = view  # the model goes on working; nothing is held twice
        return weight


def has_adapter(layer: Any) -> bool:
    """Whether a linear layer has an adapter of peft's."""
    return hasattr(layer, "lora_A")


def adapters_of(layer: Any) -> list[nn.Linear]:
    """A and B of a linear layer's adapter."""
    return [layer.lora_A[_NAME], layer.lora_B[_NAME]]


def base_of(layer: Any) -> nn.Linear:
    """The linear layer under an adapter, or the layer itself."""
    linear: nn.Linear = layer.base_layer if has_adapter(layer) else layer
    return linear


def _kept_type(weights: Sequence[Tensor], form: AnyFormat, compute_dtype: torch.dtype) -> torch.dtype:
    """In which adapters are multiplied."""
    first = weights[0]
    if compute_dtype != torch.float32 or first.device.type != "cpu":
        return compute_dtype
    if form != "exact" and all(map(fits_fp16, weights)):
        return torch.float16
    return first.dtype if all(keeps_values(w) and w.dtype == first.dtype for w in weights) else compute_dtype
