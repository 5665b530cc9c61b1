"""What the loss of n linear heads is a function of, and what it gives.

Shapes: M tokens, N specialists, H hidden size (may differ), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Rows of a head in one product: on a CPU what it writes stays in the cache, and a bf16 head is never copied to fp32
# whole. A GPU wants more at once.
MOST_ROWS_ON_CPU = 1024
MOST_ROWS_ON_GPU = 16_384


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the loss is a function of.

    Attributes:
        weights: Gate weights.
        labels: Token that each row predicts.
        hiddens: Last hidden states of each specialist, [M, H].
        heads: Weight of each head, [V, H]; rows beyond the fewest are not used.
        biases: Of each head, or None.
        dtypes: Type in which each head is multiplied.
        chunk: Tokens at a time.
        add_others: Adds to a block of a chunk's logits, in place, those of specialists that other processes hold; None:
            all are here.
    """

    weights: Float[Tensor, "M N"]
    labels: Int[Tensor, " M"]
    hiddens: Sequence[Tensor]
    heads: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    dtypes: Sequence[torch.dtype]
    chunk: int
    add_others: Callable[[Tensor], None] | None = None

    @property
    def vocabulary(self) -> int:
        """V, rows that all heads have."""
        return min(len(head) for head in self.heads)

    @property
    def exact(self) -> torch.dtype:
        """Type of logits and of sums."""
        return torch.float64 if torch.float64 in self.dtypes else torch.float32

    @property
    def device(self) -> torch.device:
        """Of everything."""
        return self.weights.device


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to make besides the NLL: gradients of the weights and of each specialist's tensors, and the details."""

    weights: bool
    hiddens: Sequence[bool]
    heads: Sequence[bool]
    biases: Sequence[bool]
    details: bool = False

    @property
    def of_specialists(self) -> bool:
        """Whether a gradient of some specialist is among it; in stage 1 none is."""
        return any((*self.hiddens, *self.heads, *self.biases))


@dataclass(frozen=True, slots=True)
class Losses:
    """NLL of each token; with details whether the likeliest was right and each specialist's own NLL, else empty."""

    nll: Float[Tensor, " M"]
    hit: Bool[Tensor, " _"]
    specialist_nll: Float[Tensor, "_ N"]


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of the inputs of the same names; None where not wanted."""

    weights: Tensor | None
    hiddens: Sequence[Tensor | None]
    heads: Sequence[Tensor | None]
    biases: Sequence[Tensor | None]


def rows_at_once(is_on_cpu: bool, is_kept: bool) -> int:
    """Rows of a head in one product; fewer on a CPU where blocks of all specialists are only summed, side by side."""
    if not is_on_cpu:
        return MOST_ROWS_ON_GPU
    return MOST_ROWS_ON_CPU if is_kept else max(1, MOST_ROWS_ON_CPU // 2)


def blocks(vocabulary: int, width: int) -> list[slice]:
    """Parts of the vocabulary, `width` tokens each but the last."""
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


def empty_losses(inputs: Inputs, wanted: Wanted) -> Losses:
    """Zeros to fill."""
    tokens, specialists = inputs.weights.shape
    detailed = tokens if wanted.details else 0
    nll = torch.zeros(tokens, dtype=inputs.exact, device=inputs.device)
    return Losses(nll, nll.new_zeros(detailed, dtype=torch.bool), nll.new_zeros(detailed, specialists))
