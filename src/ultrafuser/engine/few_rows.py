"""A few rows through weights, norms and activations, by our own kernels; `passes.py` has whole passes.

Products are then as fast as memory is read. All in fp32 on the CPU, but rows that meet bf16 weights are rounded to bf16
on processors that multiply such numbers (`rounds`). What a row becomes is the same to the bit whatever other rows there
are and however many threads.

Shapes: G specialists, M rows of each, I inputs, O outputs, R ranks of all specialists together, H hidden size, F inner
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ultrafuser.kernels.native import KINDS, kernels

MOST_ROWS = 32  # above that arithmetic is what costs, and torch's own products do it better


class Up(NamedTuple):
    """The matrices B of one linear layer, side by side: outputs, ranks, and which of these are each member's."""

    outputs: slice
    ranks: slice
    own: Sequence[slice]  # beginning with the layer's first rank; empty without an adapter
    weight: Float[Tensor, "outputs ranks"]


class Adapters(NamedTuple):
    """What the adapters of all members add to one product: B (scales * A x), for each of its linear layers."""

    down: Float[Tensor, "R I"]
    ups: Sequence[Up]
    scales: Float[Tensor, " R"]


class Matrix(NamedTuple):
    """What one product multiplies by: of each member, or of the base that all share.

    Attributes:
        weight: [G or 1, O, I] in fp32, bf16, fp16 or int8, one member after another in memory.
        units: [G or 1, O], what one of an int8 weight is.
        bias: [G or 1, O] in fp32.
        adapters: Of the members of a shared base.
    """

    weight: Tensor
    units: Tensor | None = None
    bias: Tensor | None = None
    adapters: Adapters | None = None


def has_kernel() -> bool:
    """Whether there are kernels; compiles them where that was not done yet."""
    return kernels().few_rows is not None


def rounds(dtype: torch.dtype) -> bool:
    """Whether the kernels round rows that meet weights of this type, as a model in bf16 does itself."""
    return dtype == torch.bfloat16 and has_kernel() and kernels().has_pairs


def make_room(num_threads: int, num_values: int) -> Tensor:
    """Where each thread keeps so many rounded values."""
    return torch.empty((num_threads, num_values), dtype=torch.bfloat16)


def are_few(num_rows: int) -> bool:
    """Whether the kernels, where there are any, take so many rows now: not while torch traces for a compiler."""
    return num_rows <= MOST_ROWS and not torch.compiler.is_compiling()


def why_missing() -> str:
    """Why there are none, or an empty text."""
    return kernels().reason


def multiply(
    x: Float[Tensor, "G M I"], weight: Tensor, num_threads: int, units: Float[Tensor, "G O"] | None = None
) -> Float[Tensor, "G M O"]:
    """Rows times weights, in fp32.

    Args:
        x: In fp32.
        weight: [G, O, I], in fp32, bf16, fp16 or int8, one member after another in memory.
        num_threads: That share the work; those of torch.
        units: What one of an int8 weight is.

    Raises:
        ValueError: Shapes or types do not fit, or the weight is not contiguous.
    """
    num_members, num_rows, num_in = x.shape
    num_out = weight.shape[1]
    fits = weight.shape == (num_members, num_out, num_in) and weight.is_contiguous()
    known = x.dtype == torch.float32 and weight.dtype in KINDS and x.device.type == weight.device.type == "cpu"
    if not (fits and known and are_units(units, weight)):
        raise ValueError(
            f"rows {tuple(x.shape)} of {x.dtype} and weights {tuple(weight.shape)} of {weight.dtype} do not fit, or lie"
            " in memory in other ways than the kernel reads"
        )
    x = x.contiguous()
    y = torch.empty((num_members, num_rows, num_out))
    rounded = make_room(num_threads, num_rows * num_in if weight.dtype == torch.bfloat16 else 0)
    pointers = (x.data_ptr(), weight.data_ptr(), None if units is None else units.data_ptr(), y.data_ptr())
    sizes = (num_members, num_rows, num_in, num_out)
    kernels().few_rows(*pointers, *sizes, KINDS[weight.dtype], num_threads, rounded.data_ptr())
    return y


def add_norm(
    x: Float[Tensor, "G M H"],
    more: Float[Tensor, "G M H"] | None,
    weight: Float[Tensor, "_ 1 H"],
    *,
    eps: float,
    num_threads: int,
) -> Float[Tensor, "G M H"]:
    """Add `more` to `x`, in place, and give its RMS norm times weights of all or one; any number of rows.

    Raises:
        ValueError: Shapes or types do not fit.
    """
    num_members, num_rows, size = x.shape
    if more is not None and more.shape != x.shape:
        raise ValueError(f"rows {tuple(x.shape)} and {tuple(more.shape)} cannot be added")
    check_plain((x,) if more is None else (x, more))
    if weight.shape not in ((1, 1, size), (num_members, 1, size)):
        raise ValueError(f"a norm's weights {tuple(weight.shape)} do not fit rows {tuple(x.shape)}")
    check_plain((weight,))
    y = torch.empty_like(x)
    pointers = (x.data_ptr(), None if more is None else more.data_ptr(), weight.data_ptr(), y.data_ptr())
    kernels().add_norm(*pointers, num_members, num_rows, size, len(weight), eps, num_threads)
    return y


def silu_mul(gate_up: Float[Tensor, "G M FF"], *, num_threads: int) -> Float[Tensor, "G M F"]:
    """silu(gate) * up, of rows that hold both side by side; any number of them.

    Raises:
        ValueError: An odd number of columns, or another type than fp32.
    """
    num_members, num_rows, both = gate_up.shape
    if both % 2:
        raise ValueError(f"rows of {both} columns cannot be halved")
    check_plain((gate_up,))
    y = torch.empty((num_members, num_rows, both // 2))
    kernels().silu_mul(gate_up.data_ptr(), y.data_ptr(), num_members * num_rows, both // 2, num_threads)
    return y


def own(tensor: Tensor, member: int | None) -> Tensor:
    """Of one member, or of all; what all share stays as it is."""
    return tensor if member is None or len(tensor) == 1 else tensor[member : member + 1]


def are_units(units: Tensor | None, weight: Tensor) -> bool:
    """Whether int8 weights, and no others, have units."""
    if weight.dtype != torch.int8:
        return units is None
    if units is None or units.shape != weight.shape[:2]:
        return False
    return units.dtype == torch.float32 and units.is_contiguous() and units.device.type == "cpu"


def check_plain(tensors: tuple[Tensor, ...], dtype: torch.dtype = torch.float32) -> None:
    """Refuse what the kernels cannot read.

    Raises:
        ValueError: One is of another type, on another device, or not in one piece.
    """
    for tensor in tensors:
        if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device} is no {dtype} in one piece")
