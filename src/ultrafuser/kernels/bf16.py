"""Products of bf16 numbers in fp32, which torch rounds to bf16 again on a CPU.

By our own kernel (`native.py`), on processors that multiply such numbers. A row is the same to the bit whatever other
rows there are and however many threads.
"""

from __future__ import annotations

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from ultrafuser.kernels.native import kernels


def has_bf16_kernel() -> bool:
    """Whether there is such a kernel here; compiles it where that was not done yet."""
    return kernels().has_pairs


def multiply_bf16(
    x: BFloat16[Tensor, "M I"], weight: BFloat16[Tensor, "O I"], out: Float[Tensor, "M O"] | None = None
) -> Float[Tensor, "M O"]:
    """Rows times weights, with sums in fp32, by torch's number of threads.

    Args:
        x: Any number of rows.
        weight: In one piece.
        out: Where to write, in fp32 and one piece.

    Raises:
        ValueError: Shapes, types or places do not fit.
    """
    (num_rows, num_in), num_out = x.shape, len(weight)
    y = torch.empty((num_rows, num_out)) if out is None else out
    fits = weight.shape == (num_out, num_in) and y.shape == (num_rows, num_out)
    fits &= x.dtype == weight.dtype == torch.bfloat16 and y.dtype == torch.float32
    fits &= x.device.type == weight.device.type == y.device.type == "cpu" and weight.is_contiguous()
    if not fits or not y.is_contiguous():
        raise ValueError(
            f"rows {tuple(x.shape)} of {x.dtype}, weights {tuple(weight.shape)} of {weight.dtype} and results"
            f" {tuple(y.shape)} of {y.dtype} do not fit, or do not lie in one piece on the CPU"
        )
    x = x.contiguous()
    pointers = (x.data_ptr(), weight.data_ptr(), y.data_ptr())
    kernels().multiply_pairs(*pointers, num_rows, num_in, num_out, torch.get_num_threads())
    return y
