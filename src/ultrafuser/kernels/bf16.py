"""Products of bf16 numbers in fp32, which torch's own rounds to bf16 again.

On a CPU by our own kernel (`native.py`), where the processor multiplies such numbers: a row is the same to the bit
whatever other rows there are and however many threads. On a GPU by torch's product whose result has a type of its own.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from ultrafuser.kernels.native import kernels

_CPU = torch.device("cpu")
_LARGEST_ERROR = 1e-4  # of a product of a few numbers about 1; bf16 would err by 1e-2


def has_bf16_kernel(device: torch.device = _CPU) -> bool:
    """Whether there is such a product on a device; compiles it where that was not done yet."""
    return kernels().has_pairs if device.type == "cpu" else _has_wide_product(device)


def multiply_bf16(
    x: BFloat16[Tensor, "M I"], weight: BFloat16[Tensor, "O I"], out: Float[Tensor, "M O"] | None = None
) -> Float[Tensor, "M O"]:
    """Rows times weights, with sums in fp32; on a CPU by torch's number of threads.

    Args:
        x: Any number of rows.
        weight: In one piece.
        out: Where to write, in fp32 and one piece.

    Raises:
        ValueError: Shapes, types or places do not fit.
    """
    (num_rows, num_in), num_out = x.shape, len(weight)
    y = torch.empty((num_rows, num_out), device=x.device) if out is None else out
    fits = weight.shape == (num_out, num_in) and y.shape == (num_rows, num_out)
    fits &= x.dtype == weight.dtype == torch.bfloat16 and y.dtype == torch.float32
    fits &= x.device == weight.device == y.device and weight.is_contiguous()
    if not fits or not y.is_contiguous():
        raise ValueError(
            f"rows {tuple(x.shape)} of {x.dtype}, weights {tuple(weight.shape)} of {weight.dtype} and results"
            f" {tuple(y.shape)} of {y.dtype} do not fit, or do not lie in one piece on one device"
        )
    if x.device.type != "cpu":
        return torch.mm(x, weight.T, out_dtype=torch.float32, out=y)
    x = x.contiguous()
    pointers = (x.data_ptr(), weight.data_ptr(), y.data_ptr())
    kernels().multiply_pairs(*pointers, num_rows, num_in, num_out, torch.get_num_threads())
    return y


@cache
def _has_wide_product(device: torch.device) -> bool:
    """Whether torch has it there, and it says what products in double precision do."""
    numbers = torch.arange(24 * 32, device=device).remainder(17).sub(8).div(7).bfloat16().view(24, 32)
    try:
        with torch.autocast(device.type, enabled=False):
            y = multiply_bf16(numbers[:8], numbers[8:])
    except RuntimeError:  # not for this device, or its torch
        return False
    return float((y.double() - numbers[:8].double() @ numbers[8:].double().T).abs().max()) < _LARGEST_ERROR
