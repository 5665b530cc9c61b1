"""From n specialists' logits and weights to one distribution: plain functions, each with its source.

Shapes: N specialists, T columns, V vocabulary, ... any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FusionSpace = Literal["logits", "logprobs", "probs"]


def gate_weights(scores: Float[Tensor, "*rows N"]) -> Float[Tensor, "*rows N"]:
    """Weights from scores: a softmax over the specialists, in fp32 (Section 3.1)."""
    return torch.softmax(scores.float(), dim=-1)


def fuse_logits(
    logits: Sequence[Float[Tensor, "*rows V"]],
    weights: Float[Tensor, "*rows N"],
    space: FusionSpace | str = "logits",
) -> Float[Tensor, "*rows V"]:
    """One set of logits from n, in fp32.

    * ``logits``: `sum_j w_j o_j` (Equation 1).
    * ``logprobs``: `sum_j w_j log softmax(o_j)`. The weights sum to 1, so this differs from ``logits`` by one constant
      per token: the distribution is the same, a normalised geometric mean, and values are comparable across tokens.
    * ``probs``: `log sum_j w_j softmax(o_j)`, the arithmetic mean, as in ordinary ensembles (GaC, co-LLM).
    """
    if space == "probs":
        # A weight that underflows to 0 must not give the gradient 0 * inf.
        logs = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
        terms = [torch.log_softmax(o.float(), dim=-1) + logs[..., j, None] for j, o in enumerate(logits)]
        return torch.logsumexp(torch.stack(terms), dim=0)
    fused: Tensor | None = None
    for j, o in enumerate(logits):
        values = torch.log_softmax(o.float(), dim=-1) if space == "logprobs" else o.float()
        term = weights[..., j, None] * values
        fused = term if fused is None else fused + term
    assert fused is not None, "at least one specialist"
    return fused


def uniform_scores(hidden: Float[Tensor, "*rows H"], num_specialists: int) -> Float[Tensor, "*rows N"]:
    """Scores that weigh all specialists alike: the ensemble without a gate."""
    return hidden.new_zeros((*hidden.shape[:-1], num_specialists), dtype=torch.float32)


def perplexity_scores(
    token_nll: Float[Tensor, "B T"], visible: Bool[Tensor, "B T"], temperature: float
) -> Float[Tensor, "B T"]:
    """Score a specialist by how well it has predicted the text so far.

    The score at column t is minus the mean NLL of the visible tokens up to t, over `temperature`: a softmax over the
    specialists then weighs them by inverse perplexity.

    Args:
        token_nll: Negative log-likelihood of the token in each column given those before, nats; 0 where unknown.
        visible: Columns whose `token_nll` counts.
        temperature: Lower is sharper.

    Source: PackLLM (Mavromatis et al. 2024, arXiv 2404.11531), the similarity variant.
    """
    counted = token_nll * visible
    return -counted.cumsum(dim=-1) / visible.cumsum(dim=-1).clamp(min=1) / temperature


def hold_scores(
    scores: Float[Tensor, "B T N"],
    starts: Bool[Tensor, "B T"],
    carried: Float[Tensor, "B N"] | None = None,
) -> Float[Tensor, "B T N"]:
    """Keep the scores of the last prompt column for the whole response (granularity ``prompt``).

    Args:
        scores: Scores at every column.
        starts: True at the last column of each prompt; its scores hold until the next start.
        carried: Scores from earlier columns (of a cache), held until the first start; None keeps each column's own.
    """
    columns = torch.arange(scores.shape[1], device=scores.device).expand_as(starts)
    source: Int[Tensor, "B T"] = torch.where(starts, columns, -1).cummax(dim=1).values
    held = scores.gather(1, torch.where(source < 0, columns, source).unsqueeze(-1).expand_as(scores))
    if carried is None:
        return held
    return torch.where((source < 0).unsqueeze(-1), carried.unsqueeze(1), held)
