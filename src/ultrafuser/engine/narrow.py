"""Weights in fewer bits than fp32, kept in one buffer: which are best, and how many rows are multiplied by them.

A few rows go to our own kernel (`few_rows.py`), which reads weights as they are and sums in fp32. So do many where the
processor multiplies bf16 numbers and the weights are; else many are multiplied block by block, each widened to fp32
while it lies in the cache.

Shapes: G specialists, M rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ultrafuser.engine import few_rows
from ultrafuser.engine.fp16 import has_fbgemm
from ultrafuser.kernels.bf16 import multiply_bf16
from ultrafuser.model.device import multiplies_bf16

_BLOCK = 1024  # outputs that are read back at once


def multiply_narrow(
    x: Float[Tensor, "G M I"], weight: Tensor, *, num_threads: int, units: Float[Tensor, "G O"] | None = None
) -> Float[Tensor, "G M O"]:
    """Rows in fp32 times weights [G, O, I] in 16 bits, or in int8 with what one of them is.

    Few rows need the kernel, many do not.
    """
    if few_rows.has_kernel() and few_rows.are_few(x.shape[1]):
        return few_rows.multiply(x, weight, num_threads, units)
    if few_rows.rounds(weight.dtype):
        return torch.stack([multiply_bf16(rows.bfloat16(), w) for rows, w in zip(x, weight, strict=True)])
    _, num_out, num_in = weight.shape
    y = x.new_empty((*x.shape[:2], num_out))
    block = x.new_empty((min(_BLOCK, num_out), num_in))
    for rows, own, out in zip(x, weight, y, strict=True):
        for start in range(0, num_out, _BLOCK):
            part = own[start : start + _BLOCK]
            torch.mm(rows, block[: len(part)].copy_(part).t(), out=out[:, start : start + len(part)])
    return y if units is None else y.mul_(units[:, None])


def keeps_values(weight: Tensor) -> bool:
    """Whether a weight in 16 bits is best multiplied here by rows in fp32, with values that lose nothing.

    Without our kernel bf16 is left to oneDNN where the processor has instructions for it.
    """
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    is_slow = weight.dtype == torch.float16 or not multiplies_bf16(weight.device)
    return few_rows.has_kernel() or (is_slow and has_fbgemm())
