"""Other people's fused linear cross-entropy, on joined heads and hidden states.

`sum_i w_i W_i h_i = [W_1|...|W_n] concat(w_i h_i)`, so whoever can do one linear head can do n, at the price of a copy
of all heads at every call.

Shapes: M tokens, N specialists, H hidden size (may differ), V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ultrafuser.errors import ModelError


def concatenated_loss(
    weights: Float[Tensor, "M N"],
    labels: Int[Tensor, " M"],
    hiddens: Sequence[Float[Tensor, "M _"]],
    heads: Sequence[Float[Tensor, "_ _"]],
    biases: Sequence[Float[Tensor, " _"] | None],
    backend: str,
) -> Float[Tensor, " M"]:
    """NLL of each label under the weighted sum of n linear heads, nats, by somebody else's kernel.

    Args:
        weights: Gate weights.
        labels: Token that each row predicts.
        hiddens: Last hidden states.
        heads: Weights of the heads, [V, H].
        biases: Of the heads, None where there is none.
        backend: `torch` (`torch.nn.functional.linear_cross_entropy`) or `liger` (Liger kernels, on a GPU).

    Raises:
        ModelError: The backend is unknown, not installed, or does not run on this device.
    """
    device = labels.device
    check_backend(backend, device)
    vocabulary = min(len(head) for head in heads)
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    dtype = autocast or heads[0].dtype
    parts = [(hidden * weights[:, i, None]).to(dtype) for i, hidden in enumerate(hiddens)]
    columns = [head[:vocabulary].to(dtype) for head in heads]
    if any(bias is not None for bias in biases):
        # Biases are weighed too, so they are one more hidden size of 1 each.
        for i, bias in enumerate(biases):
            if bias is not None:
                parts.append(weights[:, i, None].to(dtype))
                columns.append(bias[:vocabulary, None].to(dtype))
    joined, head = torch.cat(parts, dim=1), torch.cat(columns, dim=1)
    with torch.autocast(device.type, enabled=False):
        if backend == "torch":
            options = torch.nn.LinearCrossEntropyOptions()
            nll: Tensor = F.linear_cross_entropy(joined, head, labels, reduction="none", options=options)
        else:
            kernels: Any = importlib.import_module("liger_kernel.transformers")
            loss = kernels.LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)
            nll = loss(head, joined, labels)
    return nll.float()


def check_backend(backend: str, device: torch.device, *, space: str = "logits") -> None:
    """Refuse a loss backend that cannot run here, before anything is loaded.

    Args:
        backend: `chunked`, `torch` or `liger`.
        device: Where the loss is computed.
        space: Where the logits are fused.

    Raises:
        ModelError: It is unknown, not installed, or not for this device or space; says what to do.
    """
    if backend == "chunked":
        return
    if space != "logits":
        raise ModelError(f"the loss backend {backend} fuses in the space logits alone, not {space}: use chunked")
    if backend == "torch":
        if not hasattr(F, "linear_cross_entropy"):
            raise ModelError(
                f"the loss backend torch needs torch 2.13 or later, and this is {torch.__version__}: use chunked"
            )
        return
    if backend != "liger":
        raise ModelError(f"there is no loss backend {backend!r}: choose chunked, torch or liger")
    if device.type != "cuda":
        raise ModelError(f"the loss backend liger runs on a GPU, and this is {device.type}: use chunked")
    try:
        importlib.import_module("liger_kernel.transformers")
    except ImportError as error:
        raise ModelError(
            f"the loss backend liger cannot be imported ({error}): pip install liger-kernel, or use chunked"
        ) from error
