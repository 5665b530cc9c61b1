"""Cross-entropy of the fused distribution; n tensors of [B, T, V] never exist together.

Only response tokens reach the heads at all, a chunk of them at a time. Linear heads fused in the space of logits, which
is the paper's model, have an implementation of their own; whatever else there is makes its logits twice.

Shapes: M response tokens, N specialists, H hidden size (may differ), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ultrafuser.errors import ModelError
from ultrafuser.model.fusion import FusionSpace, fuse_logits
from ultrafuser.model.linear_loss import linear_loss
from ultrafuser.model.loss_backends import check_backend, concatenated_loss

Head = Callable[[Tensor], Tensor]
LossBackend = Literal["chunked", "torch", "liger"]


@dataclass(frozen=True, slots=True)
class LinearHead:
    """A head that is one linear layer, as tensors: read it inside the forward of the FSDP unit that holds them.

    Attributes:
        weight: Of the layer.
        bias: Of the layer, if any.
        scale: What the logits are multiplied by afterwards.
    """

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0

    def __call__(self, hidden: Float[Tensor, "*rows H"]) -> Float[Tensor, "*rows V"]:
        """Logits."""
        logits = F.linear(hidden, self.weight, self.bias)
        return logits if self.scale == 1.0 else logits * self.scale


class TokenLoss(NamedTuple):
    """Loss of each of M tokens.

    Attributes:
        nll: Negative log-likelihood under the fused distribution, nats; the one with a gradient.
        hit: Whether the likeliest token was the label; None unless asked for.
        specialist_nll: NLL [M, N] under each specialist alone; None unless asked for.
    """

    nll: Float[Tensor, " M"]
    hit: Bool[Tensor, " M"] | None = None
    specialist_nll: Float[Tensor, "M N"] | None = None


def fused_nll(
    hiddens: Sequence[Float[Tensor, "M _"]],
    weights: Float[Tensor, "M N"],
    labels: Int[Tensor, " M"],
    heads: Sequence[Head],
    *,
    space: FusionSpace | str = "logits",
    chunk: int = 1024,
    backend: LossBackend | str = "chunked",
) -> Float[Tensor, " M"]:
    """Negative log-likelihood of each label under the fused distribution, nats; see `fused_loss`."""
    return fused_loss(hiddens, weights, labels, heads, space=space, chunk=chunk, backend=backend).nll


def fused_loss(
    hiddens: Sequence[Float[Tensor, "M _"]],
    weights: Float[Tensor, "M N"],
    labels: Int[Tensor, " M"],
    heads: Sequence[Head],
    *,
    space: FusionSpace | str = "logits",
    chunk: int = 1024,
    details: bool = False,
    backend: LossBackend | str = "chunked",
) -> TokenLoss:
    """Loss of each label under the fused distribution, and on request what else one pass can tell.

    Args:
        hiddens: Last hidden states, one tensor per specialist.
        weights: Gate weights.
        labels: Token that each row predicts.
        heads: Hidden states to logits, one per specialist; the fast way wants every one a `LinearHead`.
        space: Where the logits are fused.
        chunk: Tokens whose logits are held at once, at most: peak memory grows with it, not with M.
        details: Also give `hit` and `specialist_nll`.
        backend: `chunked` is ours. `torch` and `liger` join heads and hidden states and hand them on: for
            comparison, and for those whose GPU they suit better.

    Raises:
        ModelError: A backend that cannot do what is asked or is not installed, or a head whose weight is sharded.
    """
    linear = [head for head in heads if isinstance(head, LinearHead)]
    if len(linear) == len(heads) and space == "logits":
        _refuse_shards(linear)
        scaled = [hidden if h.scale == 1.0 else hidden * h.scale for hidden, h in zip(hiddens, linear, strict=True)]
        biases = [h.bias if h.bias is None or h.scale == 1.0 else h.bias * h.scale for h in linear]
        if backend != "chunked":
            if details:
                raise ModelError(f"the loss backend {backend} tells no details of a token: use chunked")
            return TokenLoss(concatenated_loss(weights, labels, scaled, [h.weight for h in linear], biases, backend))
        nll, hit, specialist_nll = linear_loss(
            weights, labels, scaled, [h.weight for h in linear], biases, chunk=chunk, details=details
        )
        return TokenLoss(nll, hit, specialist_nll) if details else TokenLoss(nll)
    check_backend(backend, labels.device, space=space)
    if backend != "chunked":
        raise ModelError(f"the loss backend {backend} wants every head to be one linear layer: use chunked")
    return _checkpointed_loss(hiddens, weights, labels, heads, space=space, chunk=chunk, details=details)


def _checkpointed_loss(
    hiddens: Sequence[Tensor],
    weights: Tensor,
    labels: Tensor,
    heads: Sequence[Head],
    *,
    space: FusionSpace | str,
    chunk: int,
    details: bool,
) -> TokenLoss:
    """The general way: logits of a chunk are made, used and dropped, and made again in the backward pass."""
    kind = labels.device.type
    dtype, is_cast = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def chunk_loss(weights: Tensor, labels: Tensor, *hiddens: Tensor) -> tuple[Tensor, ...]:
        # Autocast would keep one copy of a head in bf16, and the gradients of all chunks would be added up in it.
        with torch.autocast(kind, dtype=dtype, enabled=is_cast, cache_enabled=False):
            logits = [head(hidden) for head, hidden in zip(heads, hiddens, strict=True)]
        fused = fuse_logits(logits, weights, space)
        nll = F.cross_entropy(fused, labels, reduction="none")
        if not details:
            return (nll,)
        with torch.no_grad():
            alone = [F.cross_entropy(own.float(), labels, reduction="none") for own in logits]
            return nll, fused.argmax(dim=-1) == labels, torch.stack(alone, dim=-1)

    pieces = [
        checkpoint(chunk_loss, weights[i], labels[i], *(hidden[i] for hidden in hiddens), use_reentrant=False)
        if torch.is_grad_enabled()
        else chunk_loss(weights[i], labels[i], *(hidden[i] for hidden in hiddens))
        for i in (slice(start, start + chunk) for start in range(0, max(len(labels), 1), chunk))
    ]
    return TokenLoss(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _refuse_shards(heads: Sequence[LinearHead]) -> None:
    for number, head in enumerate(heads):
        if hasattr(head.weight, "full_tensor"):  # a DTensor; its module need not be importable
            raise ModelError(
                f"the head of specialist {number} is a shard here: compute the loss inside the forward of the FSDP "
                "unit that holds it (torch.distributed.fsdp.register_fsdp_forward_method for other methods)"
            )
