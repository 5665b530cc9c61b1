"""Reduced weights: fewer bytes a weight, through our own kernel (fp16) and those that torch brings.

Decoding is as fast as weights are read, so fewer bytes are more tokens. `half` and `int8` may stand in for exact
weights (measured, they beat what torchao does without a compiler); `int4` is for drafts, whose mistakes only cost time.

Shapes: M rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrafuser.engine.fp16 import Fp16Matrix, has_fp16_kernels
from ultrafuser.errors import ConfigError

_GROUP = 32  # inputs that share a scale in int4
_INT4_OUTPUTS = 64
_FEW_INT8_ROWS = 8  # above that its kernel is slower than reading the weight back


class HalfProduct:
    """Weights in fp16, inputs and sums in fp32 (`Fp16Matrix`): half the bytes; four rows cost as one.

    Args:
        parts: As for `ExactProduct`; their parameters are left alone.
        num_threads: Of torch.
        is_scaled: As for `Fp16Matrix`: weights in bf16 or fp16 then are what they were.

    Raises:
        ConfigError: There is no kernel for fp16, or a weight does not fit into it.
    """

    is_copy = True
    scale = 1.0

    def __init__(
        self, parts: Sequence[Sequence[nn.Linear]], *, num_threads: int | None = None, is_scaled: bool = False
    ) -> None:
        threads = num_threads or torch.get_num_threads()
        self.packed = [Fp16Matrix(*joined(linears), num_threads=threads, is_scaled=is_scaled) for linears in parts]
        self.num_bytes = sum(matrix.num_bytes for matrix in self.packed)

    def __call__(self, x: Tensor, member: int | None = None) -> Tensor:
        packed = self.packed if member is None else self.packed[member : member + 1]
        rows = [matrix(part) for part, matrix in zip(x.float(), packed, strict=True)]
        return torch.stack(rows) if len(rows) > 1 else rows[0][None]


class Int8Product:
    """Weights in int8 with a scale for every output, inputs in bf16, sums in fp32: half the bytes of `HalfProduct`.

    Not faster than that one: it is for models that would not fit. Many rows are multiplied by the weight read back.

    Args:
        parts: As for `ExactProduct`; their parameters are left alone.

    Raises:
        ConfigError: A layer's inputs are no multiple of 16, which torch's kernel needs and does not check.
    """

    is_copy = True
    scale = 1.0

    def __init__(self, parts: Sequence[Sequence[nn.Linear]]) -> None:
        self.packed: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.num_bytes = 0
        for linears in parts:
            weight, bias = joined(linears)
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


class Int4Product:
    """Weights in int4 with a scale and a zero for every 32 inputs of an output, inputs and outputs in bf16: for drafts.

    A sixth of fp32's bytes, and for one row about twice as fast as `HalfProduct`.

    Args:
        parts: As for `ExactProduct`; their parameters are left alone.
    """

    is_copy = True
    scale = 1.0

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


def is_half_as_fast() -> bool:
    """Whether a row in half takes hardly longer than in int4, as on AVX2, where int4 spends on unpacking what it saves.

    Guesses in half are then better: measured, one in twenty-five was wrong, of int4 one in ten (`docs/results.md`).
    """
    return has_fp16_kernels() and torch.backends.cpu.get_cpu_capability() == "AVX2"


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
