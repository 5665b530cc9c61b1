"""A matrix in fp16 where there is no kernel of our own: torch's FBGEMM, with inputs and sums in fp32.

Weights that are bf16 or fp16 already lose nothing in it: times a power of two, which puts the largest near the end of
fp16's range, each of their values is one of fp16, down to 2^-31 of the largest. One to six rows cost nearly the same,
where torch's own product of bf16 on a CPU without instructions for it costs as much for each row.

Shapes: M rows, I inputs, O outputs.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_NEAR_THE_END = 15  # the largest weight becomes 2^14 at least and less than 2^15


class Fp16Matrix:
    """Rows times a matrix.

    Args:
        weight: Its values, in any type; unscaled they must fit into fp16.
        bias: Added to every row.
        num_threads: Of torch. With one thread FBGEMM is called without the machinery for many, which costs 20 us.
        is_scaled: Multiply by a power of two, so that values of bf16 and fp16 stay what they are; `__call__` undoes it.
    """

    def __init__(
        self,
        weight: Float[Tensor, "O I"],
        bias: Float[Tensor, " O"] | None = None,
        *,
        num_threads: int,
        is_scaled: bool = False,
    ) -> None:
        values = weight.detach().float()
        largest = float(values.abs().max()) if values.numel() else 0.0
        self.scale = 1.0  # what the inputs must be multiplied by
        if is_scaled and 0 < largest < float("inf"):
            self.scale = 2.0 ** (int(torch.tensor(largest).frexp().exponent) - _NEAR_THE_END)
        self.bias = bias.detach().float() if bias is not None else None
        self._packed: Any
        self._multiply: Any
        if num_threads == 1 and _has_plain_call():
            self._multiply = _plain
            with warnings.catch_warnings(action="ignore"):  # once, that it is to go one day: then the other is called
                self._packed = torch.fbgemm_pack_gemm_matrix_fp16(values / self.scale)
                _plain(values[:1], self._packed)
        else:
            torch.backends.quantized.engine = "fbgemm"
            self._packed = torch.ops.quantized.linear_prepack_fp16(values / self.scale, None)
            self._multiply = torch.ops.quantized.linear_dynamic_fp16

    def __call__(self, x: Float[Tensor, "M I"]) -> Float[Tensor, "M O"]:
        """[M, I] in fp32 to [M, O]."""
        y: Tensor = self._multiply(x if self.scale == 1.0 else x * self.scale, self._packed)
        return y if self.bias is None else y.add_(self.bias)


def has_fbgemm() -> bool:
    """Whether torch has its kernels for fp16."""
    return "fbgemm" in torch.backends.quantized.supported_engines


@cache
def _has_plain_call() -> bool:
    if not hasattr(torch, "fbgemm_pack_gemm_matrix_fp16"):
        return False
    call = getattr(torch.ops.aten, "fbgemm_linear_fp16_weight_fp32_activation", None)
    return call is not None and "Tensor? bias" in str(call.default._schema)


def _plain(x: Tensor, packed: Tensor) -> Tensor:
    y: Tensor = torch.fbgemm_linear_fp16_weight_fp32_activation(x, packed, None)
    return y
