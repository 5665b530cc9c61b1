"""How exact weights lie in memory and are multiplied when there are only a few rows.

Decoding reads every weight once for a handful of rows, so it is as fast as memory is read, if the arithmetic keeps up.
torch's own linear layer does not: it reads with one thread when rows are few, and four rows cost it four times one.

`ExactProduct` has our own kernel for up to 32 rows (`few_rows.py`), which reads the model's weights once and in order,
in fp32 or 16 bits (sums are fp32). Where that cannot be had it cuts a
product into one part per thread (a batched product over a view of the weights), each with some of the outputs, and puts
up to four rows on the right of the weight, where the library has kernels for narrow matrices (not with AVX2 and nothing
better: there rows stand on the left); weights in 16 bits are copied to fp16 without loss (`fp16.py`). `PackedProduct`
(fp32 on x86) has a copy of the weights as oneDNN's kernels like them, for more rows: prompts, and without our kernel
from two rows on. All these are fixed rules and not measurements, so that a model's answers do not depend on what else
the machine did at start.

Shapes: G specialists, M rows, I inputs, O outputs.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ultrafuser.engine import few_rows
from ultrafuser.engine.few_rows import Matrix, own
from ultrafuser.engine.narrow import keeps_values
from ultrafuser.engine.reduced import HalfProduct, Int4Product, Int8Product, joined, multiply_matrix
from ultrafuser.kernels.native import in_large_pages

WeightFormat = Literal["exact", "half", "int8"]
AnyFormat = Literal["exact", "half", "int8", "int4"]
DraftWeights = Literal["auto", "exact", "half", "int8", "int4"]
_FEW_ROWS = 16  # above that torch's own product uses all threads
_VERY_FEW_ROWS = 4  # up to that the weight stands on the left
_PACKED_FOR = 16  # rows; the layout is the same for all that follow
# oneDNN makes a kernel for every number of rows, which takes milliseconds and most of a megabyte: there are these only.
_PACKED_ROWS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


class Product(Protocol):
    """Rows times a weight, for a group of specialists or for one of its members."""

    num_bytes: int  # of the weights, of the whole group
    is_copy: bool  # the model's own parameters are not needed
    matrix: Matrix | None  # as our own kernel reads it in passes of few rows, if it can

    def __call__(self, x: Float[Tensor, "G M I"], member: int | None = None) -> Float[Tensor, "G M O"]:
        """[G, M, I] to [G, M, O]; with `member` both have one specialist."""
        ...


class ExactProduct:
    """Weights as they are, in one buffer for the group; the parameters they came from become views of it.

    Args:
        parts: Per specialist, the linear layers whose outputs stand side by side (query, key and value, say).
        num_threads: Of torch, which share a product with few rows.
    """

    is_copy = False

    def __init__(self, parts: Sequence[Sequence[nn.Linear]], *, num_threads: int) -> None:
        first = parts[0]
        num_out, num_in = sum(linear.out_features for linear in first), first[0].in_features
        kind = first[0].weight
        self.on_cpu = kind.device.type == "cpu"
        is_fp32 = self.on_cpu and kind.dtype == torch.float32
        self.is_widened = is_widened(kind, pack=False)
        has_kernel = self.is_widened or (is_fp32 and few_rows.has_kernel())
        self.is_cut = is_fp32 and not has_kernel
        self.most_on_right = 0 if _is_avx2() else _VERY_FEW_ROWS
        self.weight = in_large_pages(torch.empty((len(parts), num_out, num_in), dtype=kind.dtype, device=kind.device))
        self.bias = _joined_bias(parts)
        for j, linears in enumerate(parts):
            start = 0
            for linear in linears:
                view = self.weight[j, start : start + linear.out_features]
                view.copy_(linear.weight.detach())
                linear.weight.data = view  # the model goes on working, and nothing is held twice
                start += linear.out_features
        self.num_bytes = self.weight.numel() * self.weight.element_size()
        self.num_threads = num_threads
        self.num_parts = num_threads if num_out % num_threads == 0 else 1
        bias = None if self.bias is None else self.bias.float().view(len(parts), num_out)
        self.matrix = Matrix(self.weight, bias=bias) if has_kernel else None

    def __call__(self, x: Tensor, member: int | None = None) -> Tensor:
        if self.matrix is not None and (self.is_widened or few_rows.are_few(x.shape[1])):
            return multiply_matrix(x, self.matrix, member, num_threads=self.num_threads)
        weight = own(self.weight, member)
        if self.is_cut and x.shape[1] <= _FEW_ROWS:
            y = _product_in_parts(x, weight, self.num_parts, most_on_right=self.most_on_right)
        elif self.on_cpu or len(x) == 1:
            y = torch.stack([rows @ part.t() for rows, part in zip(x, weight, strict=True)])  # each with all threads
        else:
            y = torch.bmm(x, weight.transpose(1, 2))
        if self.bias is None:
            return y
        return y + own(self.bias, member)


class PackedProduct:
    """Weights in fp32 twice: as `ExactProduct` has them for few rows, and as oneDNN's kernels like them for more.

    Args:
        parts: As for `ExactProduct`.
        num_threads: As for `ExactProduct`.
    """

    is_copy = False  # the model's parameters are those of `exact`

    def __init__(self, parts: Sequence[Sequence[nn.Linear]], *, num_threads: int) -> None:
        self.exact = ExactProduct(parts, num_threads=num_threads)
        self.num_bytes = self.exact.num_bytes
        self.matrix = self.exact.matrix
        self.most_exact = few_rows.MOST_ROWS if self.matrix is not None else 1
        self.packed: list[tuple[Tensor, Tensor | None]] = []
        for linears in parts:
            weight, bias = joined(linears)
            self.packed.append((torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR), bias))

    def __call__(self, x: Tensor, member: int | None = None) -> Tensor:
        num_rows = x.shape[1]
        if num_rows <= self.most_exact:
            return self.exact(x, member)
        if num_rows > _PACKED_ROWS[-1]:
            return torch.cat([self(part, member) for part in torch.split(x, _PACKED_ROWS[-1], dim=1)], dim=1)
        more = _PACKED_ROWS[bisect_left(_PACKED_ROWS, num_rows)] - num_rows
        if more:
            x = F.pad(x, (0, 0, 0, more))
        packed = self.packed if member is None else self.packed[member : member + 1]
        multiply = torch.ops.mkldnn._linear_pointwise.default
        rows = [multiply(part, w, bias, "none", [], "")[:num_rows] for part, (w, bias) in zip(x, packed, strict=True)]
        return torch.stack(rows) if len(rows) > 1 else rows[0][None]


def can_pack(weight: Tensor) -> bool:
    """Whether `PackedProduct` is for such weights."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and is_x86 and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def make_product(
    parts: Sequence[Sequence[nn.Linear]],
    form: AnyFormat,
    *,
    num_threads: int,
    pack: bool = True,
) -> Product:
    """The product of a group's layers in the wanted format; `pack`: exact ones in a copy where that is faster.
    Some 16-bit weights are multiplied in fp32, all other exact ones in their own type (`compute_type`).
    """
    if form == "exact" and not few_rows.has_kernel() and is_widened(parts[0][0].weight, pack=pack):
        return HalfProduct(parts, num_threads=num_threads, is_scaled=True)
    if form == "exact":
        exact = PackedProduct if pack and can_pack(parts[0][0].weight) else ExactProduct
        return exact(parts, num_threads=num_threads)
    if form == "int4":
        return Int4Product(parts)
    return (HalfProduct if form == "half" else Int8Product)(parts, num_threads=num_threads)


def compute_type(weight: Tensor, form: AnyFormat, *, pack: bool = True) -> torch.dtype:
    """The type of inputs and outputs of the product that `make_product` makes of such weights."""
    return weight.dtype if form == "exact" and not is_widened(weight, pack=pack) else torch.float32


def cache_type(weight: Tensor, form: AnyFormat, *, pack: bool = True) -> torch.dtype:
    """The type of keys and values: the model's where the kernels round rows to it, else the one of the products."""
    is_rounded = weight.device.type == "cpu" and few_rows.rounds(weight.dtype)
    return weight.dtype if is_rounded else compute_type(weight, form, pack=pack)


def is_widened(weight: Tensor, *, pack: bool) -> bool:
    """Whether an exact weight in 16 bits is multiplied in fp32: our kernel reads it, torch's read a copy of it."""
    return keeps_values(weight) and (pack or few_rows.has_kernel())


def _is_avx2() -> bool:
    """Whether torch multiplies with AVX2 here and nothing better; other rules are faster then."""
    return bool(torch.backends.cpu.get_cpu_capability() == "AVX2")


def _product_in_parts(x: Tensor, weight: Tensor, num_parts: int, *, most_on_right: int) -> Tensor:
    """[G, M, I] times [G, O, I] with the outputs cut into parts, each a product of its own that one thread does."""
    num_members, num_rows, num_in = x.shape
    width = weight.shape[1] // num_parts
    cut = weight.view(num_members * num_parts, width, num_in)
    rows = x[:, None].expand(num_members, num_parts, num_rows, num_in).flatten(0, 1)
    if num_rows > most_on_right:
        y = torch.bmm(rows, cut.transpose(1, 2)).view(num_members, num_parts, num_rows, width).transpose(1, 2)
    else:
        y = torch.bmm(cut, rows.transpose(1, 2)).view(num_members, num_parts, width, num_rows).permute(0, 3, 1, 2)
    return y.reshape(num_members, num_rows, num_parts * width)


def _joined_bias(parts: Sequence[Sequence[nn.Linear]]) -> Tensor | None:
    if parts[0][0].bias is None:
        return None
    return torch.stack([torch.cat([linear.bias.detach() for linear in linears]) for linears in parts])[:, None]
