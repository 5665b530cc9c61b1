"""How weights lie in memory and are multiplied when there are only a few rows.

Decoding reads every weight once for a handful of rows, so it is as fast as memory is read, and torch's own linear layer
reads it with one thread when rows are few. Two things mend that without changing a value: the product is
cut into one part per thread (a batched product over a view of the same weights), and a weight much taller than wide
is stored transposed. Both are fixed rules and not measurements, so that a model's answers do not depend on what else
the machine did at start.

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
TALL = 2.0  # outputs per input from which a weight is stored transposed
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
        weight = first[0].weight
        on_cpu = weight.device.type == "cpu"
        self.transposed = on_cpu and num_out >= TALL * num_in
        shape = (num_in, num_out) if self.transposed else (num_out, num_in)
        self.weight = torch.empty((len(parts), *shape), dtype=weight.dtype, device=weight.device)
        self.bias = _joined_bias(parts)
        for j, linears in enumerate(parts):
            start = 0
            for linear in linears:
                stop = start + linear.out_features
                view = self.weight[j, :, start:stop].t() if self.transposed else self.weight[j, start:stop]
                view.copy_(linear.weight.detach())
                linear.weight.data = view  # the model goes on working, and nothing is held twice
                start = stop
        self.num_bytes = self.weight.numel() * self.weight.element_size()
        # In bf16 the kernels of oneDNN are as fast without.
        cut = on_cpu and weight.dtype == torch.float32 and num_out % num_threads == 0
        self.num_parts = num_threads if cut else 1

    def __call__(self, x: Tensor, member: int | None = None) -> Tensor:
        weight = self.weight if member is None else self.weight[member : member + 1]
        num_members, num_rows, _ = x.shape
        out = weight if self.transposed else weight.transpose(1, 2)  # [G, I, O]
        # A stack of transposed weights cannot be cut without a copy; there each specialist is a part.
        if num_rows > FEW_ROWS and out.device.type == "cpu":
            y = torch.stack([rows @ part for rows, part in zip(x, out, strict=True)])  # each with all threads
        elif self.num_parts == 1 or (num_members > 1 and self.transposed):
            y = torch.bmm(x, out) if num_members > 1 else (x[0] @ out[0])[None]
        else:
            y = _product_in_parts(x, out, self.num_parts)
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
    """[G, M, I] @ [G, I, O] with the outputs cut into parts, each a product of its own that one thread does."""
    num_members, num_rows, num_in = x.shape
    num_out = weight.shape[2]
    width = num_out // num_parts
    # [G, I, P, O/P] -> [G * P, I, O/P]: a view, whichever way the weight lies.
    if num_members == 1:
        cut = weight[0].view(num_in, num_parts, width).transpose(0, 1)
        rows = x.expand(num_parts, num_rows, num_in)
    else:
        cut = weight.view(num_members, num_in, num_parts, width).transpose(1, 2).flatten(0, 1)
        rows = x[:, None].expand(num_members, num_parts, num_rows, num_in).flatten(0, 1)
    y = torch.bmm(rows, cut)
    return y.view(num_members, num_parts, num_rows, width).transpose(1, 2).reshape(num_members, num_rows, num_out)


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
