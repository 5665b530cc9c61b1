"""How weights lie in memory and are multiplied when there are only a few rows.

Decoding reads every weight once for a handful of rows, so it is as fast as memory is read, and torch's own linear layer
reads it with one thread when rows are few. Two things mend that without changing a value: the product is cut into one
part per thread (a batched product over a view of the same weights), and up to four rows stand on the right of the
weight, where the library has kernels for narrow matrices. Both are fixed rules and not measurements, so that a model's
answers do not depend on what else the machine did at start.

Reduced weights (`half`, `int8`) go through kernels that torch brings: measured, they beat what torchao does without a
compiler.

Shapes: G specialists, M rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ultrafuser.errors import ConfigError

WeightFormat = Literal["exact", "half", "int8"]
FEW_ROWS = 16  # above that torch's own product uses all threads
VERY_FEW_ROWS = 4  # up to that the weight stands on the left
_FEW_INT8_ROWS = 8  # above that its kernel is slower than reading the weight back


class Product(Protocol):
    """Rows times a weight, for a group of specialists or for one of its members."""

    num_bytes: int  # of the weights, of the whole group

    def __call__(self, x: Float[Tensor, "G M I"], member: int | None = None) -> Float[Tensor, "G M O"]:
        """[G, M, I] to [G, M, O]; with `member` both have one specialist."""
        ...


class ExactProduct:
    """Weights as they are, in one buffer for the group; the parameters they came from become views of it.

    Args:
        parts: Per specialist, the linear layers whose outputs stand side by side (query, key and value, say).
        num_threads: Parts of a product with few rows; 1 leaves it to torch.
    """

    def __init__(self, parts: Sequence[Sequence[nn.Linear]], *, num_threads: int) -> None:
        first = parts[0]
        num_out, num_in = sum(linear.out_features for linear in first), first[0].in_features
        kind = first[0].weight
        self.weight = torch.empty((len(parts), num_out, num_in), dtype=kind.dtype, device=kind.device)
        self.bias = _joined_bias(parts)
        for j, linears in enumerate(parts):
            start = 0
            for linear in linears:
                view = self.weight[j, start : start + linear.out_features]
                view.copy_(linear.weight.detach())
                linear.weight.data = view  # the model goes on working, and nothing is held twice
                start += linear.out_features
        self.num_bytes = self.weight.numel() * self.weight.element_size()
        self.on_cpu = kind.device.type == "cpu"
        # In bf16 the kernels of oneDNN are as fast without.
        self.is_cut = self.on_cpu and kind.dtype == torch.float32
        self.num_parts = num_threads if num_out % num_threads == 0 else 1

    def __call__(self, x: Tensor, member: int | None = None) -> Tensor:
        weight = self.weight if member is None else self.weight[member : member + 1]
        if self.is_cut and x.shape[1] <= FEW_ROWS:
            y = _product_in_parts(x, weight, self.num_parts)
        elif self.on_cpu or len(x) == 1:
            y = torch.stack([rows @ part.t() for rows, part in zip(x, weight, strict=True)])  # each with all threads
        else:
            y = torch.bmm(x, weight.transpose(1, 2))
        if self.bias is None:
            return y
        return y + (self.bias if member is None else self.bias[member : member + 1])


class HalfProduct:
    """Weights in fp16, inputs and sums in fp32, by torch's FBGEMM kernels: half the bytes; four rows cost as one.

    Args:
        parts: As for `ExactProduct`; their parameters are left alone.

    Raises:
        ConfigError: This build of torch has no FBGEMM kernels, or a weight does not fit into fp16.
    """

    def __init__(self, parts: Sequence[Sequence[nn.Linear]]) -> None:
        if "fbgemm" not in torch.backends.quantized.supported_engines:
            raise ConfigError("weights in half need torch's FBGEMM kernels, which this build lacks: use exact ones")
        torch.backends.quantized.engine = "fbgemm"
        self.packed = []
        self.num_bytes = 0
        for linears in parts:
            weight, bias = _joined(linears)
            if weight.abs().max() > torch.finfo(torch.float16).max:
                raise ConfigError("a weight is too large for fp16: use exact weights")
            self.packed.append(torch.ops.quantized.linear_prepack_fp16(weight, bias))
            self.num_bytes += 2 * weight.numel()

    def __call__(self, x: Tensor, member: int | None = None) -> Tensor:
        packed = self.packed if member is None else self.packed[member : member + 1]
        multiply = torch.ops.quantized.linear_dynamic_fp16
        rows = [multiply(part, weight) for part, weight in zip(x.float(), packed, strict=True)]
        return torch.stack(rows) if len(rows) > 1 else rows[0][None]


class Int8Product:
    """Weights in int8 with a scale for every output, inputs in bf16, sums in fp32: half the bytes of `HalfProduct`.

    Not faster than that one: it is for models that would not fit. Many rows are multiplied by the weight read back.

    Args:
        parts: As for `ExactProduct`; their parameters are left alone.

    Raises:
        ConfigError: A layer's inputs are no multiple of 16, which torch's kernel needs and does not check.
    """

    def __init__(self, parts: Sequence[Sequence[nn.Linear]]) -> None:
        self.packed: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.num_bytes = 0
        for linears in parts:
            weight, bias = _joined(linears)
            if weight.shape[1] % 16:
                raise ConfigError(
                    f"weights in int8 need inputs in sixteens and a layer has {weight.shape[1]}: use half"
                )
            scales = weight.abs().amax(dim=1).clamp(min=1e-8) / 127
            codes = (weight / scales[:, None]).round().to(torch.int8)
            self.packed.append((codes, scales, bias))
            self.num_bytes += weight.numel()

    def __call__(self, x: Tensor, member: int | None = None) -> Tensor:
        packed = self.packed if member is None else self.packed[member : member + 1]
        rows = [self._multiply(part.float(), *weights) for part, weights in zip(x, packed, strict=True)]
        return torch.stack(rows) if len(rows) > 1 else rows[0][None]

    @staticmethod
    def _multiply(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        if len(x) <= _FEW_INT8_ROWS:
            y: Tensor = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), codes, scales.bfloat16()).float()
        else:
            y = torch.nn.functional.linear(x, codes.float()) * scales
        return y if bias is None else y + bias


def make_product(parts: Sequence[Sequence[nn.Linear]], form: WeightFormat, *, num_threads: int) -> Product:
    """The product of a group's layers in the wanted format."""
    if form == "exact":
        return ExactProduct(parts, num_threads=num_threads)
    return HalfProduct(parts) if form == "half" else Int8Product(parts)


def _product_in_parts(x: Tensor, weight: Tensor, num_parts: int) -> Tensor:
    """[G, M, I] times [G, O, I] with the outputs cut into parts, each a product of its own that one thread does."""
    num_members, num_rows, num_in = x.shape
    width = weight.shape[1] // num_parts
    cut = weight.view(num_members * num_parts, width, num_in)
    rows = x[:, None].expand(num_members, num_parts, num_rows, num_in).flatten(0, 1)
    if num_rows > VERY_FEW_ROWS:
        y = torch.bmm(rows, cut.transpose(1, 2)).view(num_members, num_parts, num_rows, width).transpose(1, 2)
    else:
        y = torch.bmm(cut, rows.transpose(1, 2)).view(num_members, num_parts, width, num_rows).permute(0, 3, 1, 2)
    return y.reshape(num_members, num_rows, num_parts * width)


def _joined_bias(parts: Sequence[Sequence[nn.Linear]]) -> Tensor | None:
    if parts[0][0].bias is None:
        return None
    return torch.stack([torch.cat([linear.bias.detach() for linear in linears]) for linears in parts])[:, None]


def _joined(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """The weight [O, I] and bias [O] of layers side by side, in fp32."""
    weight = torch.cat([linear.weight.detach().float() for linear in linears])
    if linears[0].bias is None:
        return weight, None
    return weight, torch.cat([linear.bias.detach().float() for linear in linears])
