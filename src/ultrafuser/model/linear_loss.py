"""The chunked loss of n linear heads as a function that autograd knows.

The gradients are made in the forward pass, while a chunk's probabilities are there: the backward pass scales them, and
never makes the logits again unless tokens count differently in it.

Shapes: M tokens, N specialists, H hidden size (may differ), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultrafuser.model.chunked_pass import ChunkedPass
from ultrafuser.model.device import multiplies_bf16
from ultrafuser.model.loss_terms import Gradients, Inputs, Wanted


class LinearLoss(torch.autograd.Function):
    """NLL of each token under the sum of n linear heads; see `linear_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        labels: Tensor,
        dtypes: Sequence[torch.dtype],
        chunk: int,
        details: bool,
        gradients: bool,
        add_others: Callable[[Tensor], None] | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and with it the gradients for the case that every token counts alike."""
        needed = [gradients and need for need in (ctx.needs_input_grad[0], *ctx.needs_input_grad[7:])]
        wanted = Wanted(needed[0], needed[1::3], needed[2::3], needed[3::3], details)
        inputs = _inputs(weights, labels, tensors, dtypes, chunk, add_others)
        losses, made = ChunkedPass(inputs, wanted).run()
        if any(needed):
            ctx.save_for_backward(weights, labels, *tensors)
            ctx.options = dtypes, chunk, add_others
            ctx.wanted = Wanted(wanted.weights, wanted.hiddens, wanted.heads, wanted.biases)
            ctx.gradients = made
        ctx.mark_non_differentiable(losses.hit, losses.specialist_nll)
        return losses.nll, losses.hit, losses.specialist_nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass made, or make them anew where tokens count differently."""
        made: Gradients | None = ctx.gradients
        ctx.gradients = None  # scaled in place below, so a second backward pass makes its own
        summed = any((*ctx.wanted.heads, *ctx.wanted.biases))
        if made is None or (summed and not _is_uniform(scale)):
            weights, labels, *tensors = ctx.saved_tensors
            made = ChunkedPass(_inputs(weights, labels, tensors, *ctx.options), ctx.wanted, scale).run()[1]
        elif len(scale):
            for rowwise in (made.weights, *made.hiddens):
                if rowwise is not None:
                    rowwise.mul_(scale[:, None])
            for total in (*made.heads, *made.biases):
                if total is not None:
                    total.mul_(scale[0])
        per_specialist = zip(made.hiddens, made.heads, made.biases, strict=True)
        return made.weights, None, None, None, None, None, None, *(g for three in per_specialist for g in three)


def linear_loss(
    weights: Float[Tensor, "M N"],
    labels: Int[Tensor, " M"],
    hiddens: Sequence[Float[Tensor, "M _"]],
    heads: Sequence[Float[Tensor, "_ _"]],
    biases: Sequence[Float[Tensor, " _"] | None],
    *,
    chunk: int,
    details: bool = False,
    add_others: Callable[[Tensor], None] | None = None,
) -> tuple[Float[Tensor, " M"], Bool[Tensor, " _"], Float[Tensor, "_ N"]]:
    """NLL of each label under the weighted sum of n linear heads, nats.

    Under autocast matrices are multiplied in its type, else in that of each head; on a CPU that has no instructions for
    bf16, in fp32. Sums are fp32 (fp64 for fp64 heads).

    Args:
        weights: Gate weights.
        labels: Token that each row predicts.
        hiddens: Last hidden states, one tensor per specialist.
        heads: Weights of the heads, [V, H]; rows beyond the fewest are not used.
        biases: Of the heads, None where there is none.
        chunk: Tokens whose logits are held at once, at most.
        details: Also give the rest of what is returned.
        add_others: Where other processes hold more specialists: adds their part to a block [C, W] of the weighted
            logits, in place. All processes must train their specialists or none, for that decides C.

    Returns:
        NLL; whether the likeliest token was the label; NLL of each specialist alone. The last two have no rows unless
        `details` are asked for, and no gradient.
    """
    tensors = [tensor for three in zip(hiddens, heads, biases, strict=True) for tensor in three]
    nll, hit, specialist_nll = LinearLoss.apply(  # type: ignore[no-untyped-call]
        weights,
        labels,
        [_product_dtype(head) for head in heads],
        chunk,
        details,
        torch.is_grad_enabled(),
        add_others,
        *tensors,
    )
    return nll, hit, specialist_nll


def _product_dtype(head: Tensor) -> torch.dtype:
    """The type in which a head is multiplied."""
    kind = head.device.type
    dtype = head.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    return torch.float32 if dtype == torch.bfloat16 and not multiplies_bf16(head.device) else dtype


def _inputs(
    weights: Tensor,
    labels: Tensor,
    tensors: Sequence[Any],
    dtypes: Sequence[torch.dtype],
    chunk: int,
    add_others: Callable[[Tensor], None] | None,
) -> Inputs:
    return Inputs(weights, labels, tensors[0::3], tensors[1::3], tensors[2::3], dtypes, chunk, add_others)


def _is_uniform(scale: Tensor) -> bool:
    """Whether all are equal; the gradient of a sum tells it by its stride, without waiting for a device."""
    return len(scale) < 2 or scale.stride() == (0,) or bool((scale == scale[0]).all())
