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

from ultrafuser.engine.fp16 import Fp16Matrix, keeps_values
from ultrafuser.engine.weights import AnyFormat

_NAME = "default"  # of the adapter in each specialist


class _Up(NamedTuple):
    """The matrices B of one linear layer: outputs and ranks that are its own."""

    outputs: slice
    ranks: slice
    matrix: Tensor | Fp16Matrix  # [O, R]


class LowRank:
    """Adapters of the layers of one product.

    Args:
        parts: Per specialist, the layers whose outputs stand side by side; those without an adapter are plain.
        form: Format of the base's weights. Exact adapters in the type of the computation become views of one buffer;
            16-bit ones are copied without loss where the computation is in fp32; beside reduced weights they are fp16.
        compute_dtype: Of inputs and outputs.
    """

    def __init__(self, parts: Sequence[Sequence[Any]], form: AnyFormat, compute_dtype: torch.dtype) -> None:
        self.copied: list[Any] = []  # linear layers whose weights are not needed any more
        downs: list[nn.Linear] = []
        factors: list[Tensor] = []  # [G, r]: the scaling of the one whose ranks these are
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
        self.num_out = start
        self.down = self._matrix(downs, 0, form, compute_dtype)
        self.ups = [_Up(o, r, self._matrix(linears, 1, form, compute_dtype)) for o, r, linears in ups]
        scales = _scale(self.down) * torch.cat(factors, dim=1)
        for up in self.ups:  # the powers of two that fp16 matrices want are taken along
            scales[:, up.ranks] *= _scale(up.matrix)
        self.scales = scales[:, None].to(compute_dtype).to(column[0].weight.device)  # [G, 1, R]
        matrices = [self.down, *(up.matrix for up in self.ups)]
        self.num_bytes = sum(
            m.num_bytes if isinstance(m, Fp16Matrix) else m.numel() * m.element_size() for m in matrices
        )

    def add_to(self, y: Float[Tensor, "G M O"], x: Float[Tensor, "G M I"], member: int | None = None) -> None:
        """Add what the adapters say of `x`, in place; with `member` both have one specialist."""
        scales = self.scales if member is None else self.scales[member : member + 1]
        lowered = _times(x.reshape(-1, x.shape[-1]), self.down).view(*x.shape[:2], -1)
        lowered = (lowered * scales).view(-1, lowered.shape[-1])
        rows = y.view(-1, self.num_out)
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
