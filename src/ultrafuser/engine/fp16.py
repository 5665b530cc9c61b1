"""A matrix in fp16: half the bytes of fp32, inputs and sums in fp32.

Weights that are bf16 or fp16 already lose nothing in it: times a power of two, which puts the largest near the end of
fp16's range, each of their values is one of fp16, down to 2^-31 of the largest. One to six rows cost nearly the same,
where torch's own product of bf16 on a CPU without instructions for it costs as much for each row. It is our own kernel
that multiplies (`few_rows.py`), or torch's FBGEMM where there is none.

Shapes: M rows, I inputs, O outputs.
"""

from __future__ import annotations

import warnings
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ultrafuser.engine import few_rows
from ultrafuser.engine.native import in_large_pages
from ultrafuser.errors import ConfigError
from ultrafuser.model.device import multiplies_bf16

_BLOCK = 1024  # outputs that are read back at once
_NEAR_THE_END = 15  # the largest weight becomes 2^14 at least and less than 2^15


class Fp16Matrix:
    """Rows times a matrix.

    Args:
        weight: Its values, in any type.
        bias: Added to every row.
        num_threads: Of torch. With one thread FBGEMM is called without the machinery for many, which costs 20 us.
        is_scaled: Multiply by a power of two, so that values of bf16 and fp16 stay what they are; `__call__` undoes it.

    Raises:
        ConfigError: There is no kernel for fp16, or a weight does not fit into it unscaled.
    """

    def __init__(
        self,
        weight: Float[Tensor, "O I"],
        bias: Float[Tensor, " O"] | None = None,
        *,
        num_threads: int,
        is_scaled: bool = False,
    ) -> None:
        if not has_fp16_kernels():
            raise ConfigError(
                "weights in half need a C compiler, or torch's FBGEMM kernels, which this build lacks: use exact ones"
            )
        values = weight.detach().float()
        largest = float(values.abs().max()) if values.numel() else 0.0
        self.scale = 1.0  # what the inputs must be multiplied by
        if is_scaled and 0 < largest < float("inf"):
            self.scale = 2.0 ** (int(torch.tensor(largest).frexp().exponent) - _NEAR_THE_END)
        elif largest > torch.finfo(torch.float16).max:
            raise ConfigError("a weight is too large for fp16: use exact weights")
        self.num_bytes = 2 * values.numel()
        self.bias = bias.detach().float() if bias is not None else None
        self.weight: Tensor | None = None  # [O, I] times the scale, where it is our own kernel that multiplies
        self._packed: Any
        self._multiply: Any
        if few_rows.has_kernel():
            self._packed = self.weight = in_large_pages(torch.empty(values.shape, dtype=torch.float16))
            self.weight.copy_(values / self.scale)
            self._multiply = partial(multiply_16_bit, num_threads=num_threads)
        elif num_threads == 1 and _has_plain_call():
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

    def unscaled(self, x: Float[Tensor, "M I"]) -> Float[Tensor, "M O"]:
        """The same of inputs that were multiplied by `scale` already, and without bias."""
        y: Tensor = self._multiply(x, self._packed)
        return y


def multiply_16_bit(x: Float[Tensor, "M I"], weight: Float[Tensor, "O I"], *, num_threads: int) -> Tensor:
    """[M, I] in fp32 to [M, O], with the kernel for few rows; many are multiplied by blocks of the weight in fp32.

    A block stays in the processor's cache, so reading it back costs next to nothing.
    """
    if few_rows.are_few(len(x)):
        return few_rows.multiply(x[None], weight[None], num_threads)[0]
    y = x.new_empty((len(x), len(weight)))
    block = x.new_empty((min(_BLOCK, len(weight)), weight.shape[1]))
    for start in range(0, len(weight), _BLOCK):
        part = weight[start : start + _BLOCK]
        torch.mm(x, block[: len(part)].copy_(part).t(), out=y[:, start : start + len(part)])
    return y


def has_fp16_kernels() -> bool:
    """Whether there is anything that multiplies by fp16 weights fast."""
    return few_rows.has_kernel() or has_fbgemm()


def has_fbgemm() -> bool:
    """Whether torch has its kernels for fp16."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def keeps_values(weight: Tensor) -> bool:
    """Whether a weight in 16 bits is best multiplied in fp32 here, by values that lose nothing.

    Where the processor has instructions for bf16, products of bf16 are left to oneDNN.
    """
    wanted = weight.dtype == torch.float16 or (weight.dtype == torch.bfloat16 and not multiplies_bf16(weight.device))
    return wanted and weight.device.type == "cpu" and has_fp16_kernels()


@cache
def _has_plain_call() -> bool:
    if not hasattr(torch, "fbgemm_pack_gemm_matrix_fp16"):
        return False
    call = getattr(torch.ops.aten, "fbgemm_linear_fp16_weight_fp32_activation", None)
    return call is not None and "Tensor? bias" in str(call.default._schema)


def _plain(x: Tensor, packed: Tensor) -> Tensor:
    y: Tensor = torch.fbgemm_linear_fp16_weight_fp32_activation(x, packed, None)
    return y
