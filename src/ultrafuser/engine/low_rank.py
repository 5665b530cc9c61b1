"""What adapters of n specialists add to one product of their shared base: scaling * B A x, each for its own rows.

All specialists' A are one matrix over all rows, so that there is one small product and not n; what belongs to others is
set to zero (together with the scaling), and one product with all specialists' B side by side adds up the rest. So ranks
may differ, and nothing is filled up. It costs a little arithmetic in vain, which decoding has to spare: its time is
that of reading the weights, and of calling operations.

Shapes: G specialists, M rows of each, I inputs, O outputs, R ranks of all specialists and layers together.

Source of the update: Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ultrafuser.engine.few_rows import Adapters, Up, own
from ultrafuser.engine.narrow import keeps_values, multiply_narrow
from ultrafuser.engine.reduced import fits_fp16
from ultrafuser.engine.weights import AnyFormat

_NAME = "default"  # of the adapter in each specialist


class Ranks(NamedTuple):
    """How the adapters of the layers of one product lie side by side: layer by layer, in each all specialists."""

    downs: list[nn.Linear]  # A [r, I] of each
    factors: Float[Tensor, "G R"]  # the scaling of the specialist whose rank it is, zero for the others
    ups: list[tuple[slice, slice, list[nn.Linear]]]  # of each adapted layer: its outputs, its ranks, B [O, r] of each


def lay_out(parts: Sequence[Sequence[Any]]) -> Ranks:
    """The layout for layers whose outputs stand side by side, given per specialist; those without adapters are plain.

    At least one has an adapter.
    """
    downs: list[nn.Linear] = []
    factors: list[Tensor] = []
    ups: list[tuple[slice, slice, list[nn.Linear]]] = []
    start = rank = 0
    for column in zip(*parts, strict=True):
        layers = [(j, layer) for j, layer in enumerate(column) if has_adapter(layer)]
        first = rank
        for j, layer in layers:
            downs.append(layer.lora_A[_NAME])
            factor = torch.zeros((len(parts), downs[-1].out_features))
            factor[j] = layer.scaling[_NAME]
            factors.append(factor)
            rank += downs[-1].out_features
        stop = start + column[0].out_features
        if layers:
            ups.append((slice(start, stop), slice(first, rank), [layer.lora_B[_NAME] for _, layer in layers]))
        start = stop
    return Ranks(downs, torch.cat(factors, dim=1), ups)


class LowRank:
    """Adapters of the layers of one product.

    Args:
        ranks: Of these layers.
        form: Format of the base's weights. Exact adapters keep their values, in 16 bits where such a product is fast,
            and become views of one buffer unless their type changes; beside reduced weights they are fp16, if they fit.
        compute_dtype: Of inputs and outputs.
        num_threads: Of torch.
    """

    def __init__(self, ranks: Ranks, form: AnyFormat, compute_dtype: torch.dtype, *, num_threads: int) -> None:
        linears = [*ranks.downs, *(linear for _, _, linears in ranks.ups for linear in linears)]
        self.num_threads = num_threads
        self.dtype = _kept_type([linear.weight for linear in linears], form, compute_dtype)
        self.copied = linears if self.dtype != linears[0].weight.dtype else []  # whose weights are not needed any more
        self.down = self._joined(ranks.downs, is_turned=False)
        self.ups = [Up(outputs, own_ranks, self._joined(own, is_turned=True)) for outputs, own_ranks, own in ranks.ups]
        self.scales = ranks.factors.to(self.down.device, compute_dtype)
        self.num_bytes = sum(m.numel() * m.element_size() for m in (self.down, *(up.weight for up in self.ups)))

    @property
    def adapters(self) -> Adapters:
        """As our own kernel reads them."""
        return Adapters(self.down, self.ups, self.scales)

    def add_to(self, y: Float[Tensor, "G M O"], x: Float[Tensor, "G M I"], member: int | None = None) -> None:
        """Add what the adapters say of `x`, in place; with `member` both have one specialist."""
        lowered = self._times(x.reshape(-1, x.shape[-1]), self.down).view(*x.shape[:2], -1)
        lowered = (lowered * own(self.scales, member)[:, None]).view(-1, lowered.shape[-1])
        rows = y.view(-1, y.shape[-1])
        for outputs, ranks, weight in self.ups:
            rows[:, outputs].add_(lowered[:, ranks] @ weight.to(x.dtype))

    def _times(self, x: Tensor, matrix: Tensor) -> Tensor:
        if matrix.dtype == x.dtype:
            return x @ matrix.t()
        return multiply_narrow(x[None], matrix[None], num_threads=self.num_threads)[0]

    def _joined(self, linears: list[nn.Linear], *, is_turned: bool) -> Tensor:
        """Weights of layers, one below the other."""
        parts = [linear.weight.detach().to(self.dtype) for linear in linears]
        weight = torch.cat([part.t() for part in parts] if is_turned else parts).contiguous()
        if not self.copied:
            views = torch.split(weight, [part.shape[int(is_turned)] for part in parts])
            for linear, view in zip(linears, views, strict=True):
                linear.weight.data = view.t() if is_turned else view  # the model goes on working; nothing is held twice
        return weight


def has_adapter(layer: Any) -> bool:
    """Whether a linear layer has an adapter of peft's."""
    return hasattr(layer, "lora_A")


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
