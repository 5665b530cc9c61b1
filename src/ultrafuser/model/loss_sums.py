"""Sums over the vocabulary that grow block by block.

Source: the online softmax of Milakov and Gimelshein, 2018: what was summed is rescaled whenever a larger logit comes.

Shapes: C tokens, N specialists, W of the vocabulary in a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Labels:
    """Where labels stand in a block.

    Attributes:
        start: First token of the block.
        columns: Of each label, [C, 1]; any column for labels elsewhere.
        is_here: Whether the label is in the block at all, [C].
    """

    def __init__(self, labels: Int[Tensor, " C"], block: slice) -> None:
        self.start = block.start
        self.is_here = (labels >= block.start) & (labels < block.stop)
        self.columns = (labels - block.start).clamp(0, block.stop - block.start - 1)[:, None]

    def read(self, logits: Float[Tensor, "C W"], before: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
        """What stands at the labels; what was known `before` for rows whose label is elsewhere."""
        return torch.where(self.is_here, logits.gather(1, self.columns)[:, 0], before)


class Sums:
    """For each token of a chunk what the softmax and its gradient need.

    Attributes:
        highest: Largest logit yet, [C].
        total: `sum exp(l - highest)`, [C].
        at_label: Logit of the label, [C].
        inner: `sum exp(l - highest) o_i` of each specialist's logits `o_i`, [C, N]; no columns unless weighed.
        inner_at_label: `o_i` of the label, [C, N].
        likeliest: Token of the largest logit yet, [C], the first of equal ones; None unless located.
        peaks: `highest` after each block.

    Args:
        weights: Gate weights, for their shape and type.
        weighed: Whether `inner` is wanted.
        located: Whether `likeliest` is wanted.
    """

    def __init__(self, weights: Float[Tensor, "C N"], *, weighed: bool = False, located: bool = False) -> None:
        zeros = weights.new_zeros(len(weights))
        self.highest = torch.full_like(zeros, -torch.inf)
        self.total, self.at_label = zeros, zeros
        self.inner, self.inner_at_label = weights.new_zeros(2, len(weights), weights.shape[1] if weighed else 0)
        self.likeliest = zeros.long() if located else None
        self.peaks: list[Tensor] = []

    def add(
        self,
        logits: Float[Tensor, "C W"],
        labels: Labels,
        own: Sequence[Float[Tensor, "C W"]] = (),
        product: Tensor | None = None,
    ) -> None:
        """Take in a block. Its logits become `exp(l - highest)`, with the `highest` that is known then.

        Args:
            logits: Of the block; changed in place.
            labels: In the block.
            own: Logits of each specialist, if weighed.
            product: Room [C, W] to multiply into.
        """
        self.at_label = labels.read(logits, self.at_label)
        if self.likeliest is not None:
            here, column = logits.max(dim=-1)
            self.likeliest = torch.where(here > self.highest, labels.start + column, self.likeliest)
        highest = torch.maximum(self.highest, logits.amax(dim=-1))
        shrink = (self.highest - highest).exp_()
        exponentials = logits.sub_(highest[:, None]).exp_()
        self.total = self.total * shrink + exponentials.sum(dim=-1)
        self.highest = highest
        self.peaks.append(highest)
        if self.inner.shape[1]:
            self.inner.mul_(shrink[:, None])
            for i, each in enumerate(own):
                self.inner[:, i] += torch.mul(each, exponentials, out=product).sum(dim=-1)
                self.inner_at_label[:, i] = labels.read(each, self.inner_at_label[:, i])

    @property
    def nll(self) -> Float[Tensor, " C"]:
        """Negative log-likelihood of the labels, nats."""
        return self.total.log() + self.highest - self.at_label
