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

from ultrafuser.engine.few_rows import are_few, multiply_adapted
from ultrafuser.engine.fp16 import Fp16Matrix, keeps_values
from ultrafuser.engine.reduced import joined
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


class _Up(NamedTuple):
    """The matrices B of one linear layer: outputs and ranks that are its own."""

    outputs: slice
    ranks: slice
    matrix: Tensor | Fp16Matrix  # [O, R]


class LowRank:
    """Adapters of the layers of one product.

    Args:
        ranks: Of these layers.
        form: Format of the base's weights. Exact adapters in the type of the computation become views of one buffer;
            16-bit ones are copied without loss where the computation is in fp32; beside reduced weights they are fp16.
        compute_dtype: Of inputs and outputs.
    """

    def __init__(self, ranks: Ranks, form: AnyFormat, compute_dtype: torch.dtype) -> None:
        self.copied: list[Any] = []  # linear layers whose weights are not needed any more
        self.down = self._matrix(ranks.downs, 0, form, compute_dtype)
        self.ups = [_Up(o, r, self._matrix(linears, 1, form, compute_dtype)) for o, r, linears in ranks.ups]
        scales = _scale(self.down) * ranks.factors
        for up in self.ups:  # the powers of two that fp16 matrices want are taken along
            scales[:, up.ranks] *= _scale(up.matrix)
        self.scales = scales[:, None].to(ranks.downs[0].weight.device, compute_dtype)  # [G, 1, R]
        matrices = [self.down, *(up.matrix for up in self.ups)]
        self.num_bytes = sum(
            m.num_bytes if isinstance(m, Fp16Matrix) else m.numel() * m.element_size() for m in matrices
        )

    def add_to(self, y: Float[Tensor, "G M O"], x: Float[Tensor, "G M I"], member: int | None = None) -> None:
        """Add what the adapters say of `x`, in place; with `member` both have one specialist."""
        scales = self.scales if member is None else self.scales[member : member + 1]
        lowered = _times(x.reshape(-1, x.shape[-1]), self.down).view(*x.shape[:2], -1)
        lowered = (lowered * scales).view(-1, lowered.shape[-1])
        rows = y.view(-1, y.shape[-1])
        for outputs, ranks, matrix in self.ups:
            own, part = rows[:, outputs], lowered[:, ranks]
            if isinstance(matrix, Fp16Matrix):
                own.add_(matrix.unscaled(part))
            else:
                own.addmm_(part, matrix.t())

    def _matrix(
        self, linears: list[nn.Linear], dim: int, form: AnyFormat, compute_dtype: torch.dtype
    ) -> Tensor | Fp16Matrix:
        """Weights of layers joined along their outputs (0) or inputs (1)."""
        weight = torch.cat([linear.weight.detach() for linear in linears], dim=dim)
        if compute_dtype == torch.float32 and (form != "exact" or keeps_values(weight)) and weight.device.type == "cpu":
            self.copied += linears
            return Fp16Matrix(weight, num_threads=1, is_scaled=True)
        if weight.dtype != compute_dtype:
            self.copied += linears
            return weight.to(compute_dtype)
        sizes = [linear.weight.shape[dim] for linear in linears]
        for linear, view in zip(linears, torch.split(weight, sizes, dim), strict=True):
            linear.weight.data = view  # the model goes on working, and nothing is held twice
        return weight


class JoinedFp16:
    """Base and adapters in fp16, where B is further inputs of the base's matrix: [W B] [x; scaling * A x].

    Two products and no sum: what a step costs beside reading weights is operations. For the same reason what comes out
    is left to be multiplied by `scale`: a norm before it or a sum after it can do that on the way.

    Args:
        parts: Per specialist, the layers whose outputs stand side by side.
        ranks: Of these layers.
        num_threads: Of torch.
    """

    is_copy = True

    def __init__(self, parts: Sequence[Sequence[Any]], ranks: Ranks, *, num_threads: int) -> None:
        self.num_threads = num_threads
        self.down = Fp16Matrix(
            torch.cat([linear.weight.detach().float() for linear in ranks.downs]), num_threads=1, is_scaled=True
        )
        weight, bias = joined([base_of(layer) for layer in parts[0]])
        ups = weight.new_zeros((len(weight), ranks.factors.shape[1]))
        for outputs, columns, linears in ranks.ups:
            ups[outputs, columns] = torch.cat([linear.weight.detach().float() for linear in linears], dim=1)
        self.matrix = Fp16Matrix(torch.cat([weight, ups], dim=1), num_threads=num_threads, is_scaled=True)
        self.scale = self.matrix.scale
        self.bias = bias.detach().float() / self.scale if bias is not None else None
        self.scales = self.down.scale * ranks.factors  # [G, R]
        self.num_bytes = self.down.num_bytes + self.matrix.num_bytes

    def want_scaled(self) -> float:
        """From now on inputs are multiplied by what is returned, and outputs are whole."""
        scale, self.scale = self.scale, 1.0
        if self.bias is not None:
            self.bias *= scale
        return scale

    def __call__(self, x: Float[Tensor, "G M I"], member: int | None = None) -> Float[Tensor, "G M O"]:
        """[G, M, I] to [G, M, O], still to be multiplied by `scale`; with `member` both have one specialist."""
        scales = self.scales if member is None else self.scales[member : member + 1]
        num_members, num_rows, num_in = x.shape
        if self.matrix.weight is not None and self.down.weight is not None and are_few(num_members * num_rows):
            y = multiply_adapted(x, self.down.weight, scales, self.matrix.weight, self.num_threads)
            return y if self.bias is None else y.add_(self.bias)
        rows = x.reshape(num_members * num_rows, num_in)
        lowered = self.down.unscaled(rows)
        lowered.view(num_members, num_rows, -1).mul_(scales[:, None])
        y = self.matrix.unscaled(torch.cat((rows, lowered), dim=1))
        if self.bias is not None:
            y.add_(self.bias)
        return y.view(num_members, num_rows, -1)


def has_adapter(layer: Any) -> bool:
    """Whether a linear layer has an adapter of peft's."""
    return hasattr(layer, "lora_A")


def base_of(layer: Any) -> nn.Linear:
    """The linear layer under an adapter, or the layer itself."""
    linear: nn.Linear = layer.base_layer if has_adapter(layer) else layer
    return linear


def _scale(matrix: Tensor | Fp16Matrix) -> float:
    return matrix.scale if isinstance(matrix, Fp16Matrix) else 1.0


def _times(x: Tensor, matrix: Tensor | Fp16Matrix) -> Tensor:
    return matrix.unscaled(x) if isinstance(matrix, Fp16Matrix) else x @ matrix.t()
