"""Reduced weights: fewer bytes a weight, through our own kernel (fp16, int8) and those that torch brings.

Decoding is as fast as weights are read, so fewer bytes are more tokens. `half` and `int8` may stand in for exact
weights; drafts, whose mistakes only cost time, are written by `int8`, or by `int4` where there is no kernel.

Shapes: M rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrafuser.engine import few_rows
from ultrafuser.engine.few_rows import Matrix, own
from ultrafuser.engine.fp16 import Fp16Matrix, has_fbgemm
from ultrafuser.engine.narrow import multiply_narrow
from ultrafuser.errors import ConfigError
from ultrafuser.kernels.native import in_large_pages

_GROUP = 32  # inputs that share a scale in int4
_INT4_OUTPUTS = 64
_FEW_INT8_ROWS = 8  # above that its kernel is slower than reading the weight back


class HalfProduct:
    """Weights in fp16, inputs and sums in fp32: half the bytes.

    Args:
        parts: As for `ExactProduct`; their parameters are left alone.
        num_threads: Of torch.
        is_scaled: Times a power of two, which loses nothing of bf16 and fp16 (`Fp16Matrix`); without our kernel only.

    Raises:
        ConfigError: There is no kernel for fp16, or a weight does not fit into it.
    """

    is_copy = True

    def __init__(
        self, parts: Sequence[Sequence[nn.Linear]], *, num_threads: int | None = None, is_scaled: bool = False
    ) -> None:
        self.num_threads = num_threads or torch.get_num_threads()
        if not (few_rows.has_kernel() or has_fbgemm()):
            raise ConfigError(
                "weights in half need a C compiler, or torch's FBGEMM kernels, which this build lacks: use exact ones"
            )
        if not is_scaled and not all(fits_fp16(linear.weight) for linears in parts for linear in linears):
            raise ConfigError("a weight is too large for fp16: use exact weights")
        self.matrix: Matrix | None = None
        self.packed: list[Fp16Matrix] = []
        if few_rows.has_kernel():
            self.matrix = _in_one_buffer(parts, torch.float16)
        else:
            self.packed = [
                Fp16Matrix(*joined(linears), num_threads=self.num_threads, is_scaled=is_scaled) for linears in parts
            ]
        self.num_bytes = 2 * sum(linear.weight.numel() for linears in parts for linear in linears)

    def __call__(self, x: Tensor, member: int | None = None) -> Tensor:
        if self.matrix is not None:
            return multiply_matrix(x, self.matrix, member, num_threads=self.num_threads)
        packed = self.packed if member is None else self.packed[member : member + 1]
        rows = [matrix(part) for part, matrix in zip(x.float(), packed, strict=True)]
        return torch.stack(rows) if len(rows) > 1 else rows[0][None]


class Int8Product:
    """Weights in int8 with a scale for every output, inputs and sums in fp32: half the bytes of `HalfProduct`.

    Without our own kernel torch's is called, which rounds inputs to bf16; many rows are multiplied by the weight read
    back.

    Args:
        parts: As for `ExactProduct`; their parameters are left alone.
        num_threads: Of torch.

    Raises:
        ConfigError: A layer's inputs are no multiple of 16, which torch's kernel needs and does not check.
    """

    is_copy = True

    def __init__(self, parts: Sequence[Sequence[nn.Linear]], *, num_threads: int | None = None) -> None:
        self.num_threads = num_threads or torch.get_num_threads()
        num_in = parts[0][0].in_features
        if num_in % 16 and not few_rows.has_kernel():
            raise ConfigError(f"weights in int8 need inputs in sixteens and a layer has {num_in}: use half")
        found = _in_one_buffer(parts, torch.int8)
        self.codes, self.units, self.bias = found.weight, found.units, found.bias
        self.matrix = found if few_rows.has_kernel() else None
        self.num_bytes = self.codes.numel()

    def __call__(self, x: Tensor, member: int | None = None) -> Tensor:
        if self.matrix is not None or x.shape[1] > _FEW_INT8_ROWS:
            whole = Matrix(self.codes, self.units, self.bias)
            return multiply_matrix(x, whole, member, num_threads=self.num_threads)
        assert self.units is not None
        members = range(len(self.codes)) if member is None else (member,)
        y = torch.stack(
            [
                torch.ops.aten._weight_int8pack_mm(part.bfloat16(), self.codes[j], self.units[j].bfloat16()).float()
                for part, j in zip(x, members, strict=True)
            ]
        )
        return y if self.bias is None else y.add_(own(self.bias, member)[:, None])


def multiply_matrix(x: Tensor, matrix: Matrix, member: int | None, *, num_threads: int) -> Tensor:
    """[G, M, I] times weights in few bits; with `member` of one specialist."""
    units = None if matrix.units is None else own(matrix.units, member)
    y = multiply_narrow(x.float(), own(matrix.weight, member), num_threads=num_threads, units=units)
    return y if matrix.bias is None else y.add_(own(matrix.bias, member)[:, None])


def fits_fp16(weight: Tensor) -> bool:
    """Whether no number is too large for fp16."""
    return not weight.numel() or float(weight.detach().abs().amax()) <= torch.finfo(torch.float16).max


class Int4Product:
    """Weights in int4 with a scale and a zero for every 32 inputs of an output, inputs and outputs in bf16: for drafts.

    A sixth of fp32's bytes.

    Args:
        parts: As for `ExactProduct`; their parameters are left alone.
    """

    is_copy = True
    matrix: Matrix | None = None  # our own kernel does not read it

    def __init__(self, parts: Sequence[Sequence[nn.Linear]]) -> None:
        self.packed: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.num_bytes = 0
        for linears in parts:
            weight, bias = joined(linears)
            self.num_in, self.num_out = weight.shape[1], weight.shape[0]
            # The kernel takes whole groups of inputs and whole blocks of outputs.
            weight = F.pad(weight, (0, -self.num_in % _GROUP, 0, -self.num_out % _INT4_OUTPUTS))
            codes, scales = _to_int4(weight)
            self.packed.append((torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scales, bias))
            self.num_bytes += weight.numel() // 2 + 2 * scales.numel()

    def __call__(self, x: Tensor, member: int | None = None) -> Tensor:
        packed = self.packed if member is None else self.packed[member : member + 1]
        x = x.bfloat16().contiguous()
        if self.num_in % _GROUP:
            x = F.pad(x, (0, -self.num_in % _GROUP))
        rows = []
        for part, (codes, scales, bias) in zip(x, packed, strict=True):
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(part, codes, _GROUP, scales).float()
            if self.num_out % _INT4_OUTPUTS:
                y = y[:, : self.num_out]
            rows.append(y if bias is None else y + bias)
        return torch.stack(rows) if len(rows) > 1 else rows[0][None].contiguous()


def is_int4_fast() -> bool:
    """Whether torch has a kernel for int4 that uses this machine's wide registers."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _in_one_buffer(parts: Sequence[Sequence[nn.Linear]], dtype: torch.dtype) -> Matrix:
    """Weights of a group in fp16 or int8, as our kernel reads them."""
    num_out, num_in = sum(linear.out_features for linear in parts[0]), parts[0][0].in_features
    weight = in_large_pages(torch.empty((len(parts), num_out, num_in), dtype=dtype))
    units = torch.empty((len(parts), num_out)) if dtype == torch.int8 else None
    biases = []
    for j, linears in enumerate(parts):
        values, bias = joined(linears)
        biases.append(bias)
        if units is not None:
            units[j] = values.abs().amax(dim=1).clamp(min=1e-8) / 127
            values = values.div_(units[j][:, None]).round_()
        weight[j].copy_(values)
    return Matrix(weight, units, None if biases[0] is None else torch.stack([b for b in biases if b is not None]))


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [O, I] of 0 to 15, and scale and zero [I / 32, O, 2]: a weight is (code - 8) * scale + zero."""
    groups = weight.view(len(weight), -1, _GROUP)
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    scale = ((high - low).clamp(min=1e-6) / 15).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()
    codes = ((groups - zero) / scale + 8).round_().clamp_(0, 15).to(torch.int32).flatten(1)
    return codes, torch.cat([scale, zero], dim=-1).transpose(0, 1).contiguous().bfloat16()


def joined(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """The weight [O, I] and bias [O] of layers side by side, in fp32."""
    weight = torch.cat([linear.weight.detach().float() for linear in linears])
    if linears[0].bias is None:
        return weight, None
    return weight, torch.cat([linear.bias.detach().float() for linear in linears])
