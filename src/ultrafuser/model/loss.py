"""Cross-entropy of the fused distribution, chunk by chunk.

The logits of a chunk of tokens are made, used and dropped, and made again in the backward pass, so n tensors
of [B, T, V] never exist together; only response tokens reach the heads at all.

Shapes: M response tokens, N specialists, H hidden size (may differ), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ultrafuser.model.fusion import FusionSpace, fuse_logits

Head = Callable[[Tensor], Tensor]


def fused_nll(
    hiddens: Sequence[Float[Tensor, "M _"]],
    weights: Float[Tensor, "M N"],
    labels: Int[Tensor, M],
    heads: Sequence[Head],
    *,
    space: FusionSpace | str = "logits",
    chunk: int = 1024,
) -> Float[Tensor, M]:
    """Negative log-likelihood of each label under the fused distribution, nats.

    Args:
        hiddens: Last hidden states, one tensor per specialist.
        weights: Gate weights.
        labels: Token that each row predicts.
        heads: Hidden states to logits, one per specialist.
        space: Where the logits are fused.
        chunk: Tokens whose logits are held at once: peak memory grows with it, not with M.
    """

    def chunk_nll(weights: Tensor, labels: Tensor, *hiddens: Tensor) -> Tensor:
        logits = [head(hidden) for head, hidden in zip(heads, hiddens, strict=True)]
        return F.cross_entropy(fuse_logits(logits, weights, space), labels, reduction="none")

    pieces = [
        checkpoint(chunk_nll, weights[i], labels[i], *(hidden[i] for hidden in hiddens), use_reentrant=False)
        if torch.is_grad_enabled()
        else chunk_nll(weights[i], labels[i], *(hidden[i] for hidden in hiddens))
        for i in (slice(start, start + chunk) for start in range(0, len(labels), chunk))
    ]
    return torch.cat(pieces) if pieces else weights.new_zeros(0)
