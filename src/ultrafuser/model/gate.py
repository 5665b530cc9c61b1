"""The gate: how much each specialist says about the next token.

One small network, shared by all specialists, scores each one's last hidden state; a softmax over the
specialists turns scores into weights (Section 3.1). Since it scores every specialist alone, specialists may
be added or left out at load.

Shapes: N specialists, H hidden size (may differ between specialists), ... any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ultrafuser.config.recipe import GateConfig


class Gate(nn.Module):
    """Shared scorer of last hidden states.

    Two linear layers with ReLU between, hidden size 512 (Appendix B); both are settings. Where hidden sizes
    differ, each specialist gets a linear projection to the gate's width before the shared layers (Appendix D).
    Everything is computed in fp32: in bf16 near-ties between specialists flip.

    Args:
        input_sizes: Hidden size of each specialist by name, in order.
        hidden_size: Width of the gate.
        num_layers: Linear layers, at least 1.

    Source: Ding et al. 2024 (arXiv 2403.08281), Section 3.1, Appendix B and D.
    """

    def __init__(self, input_sizes: Mapping[str, int], *, hidden_size: int = 512, num_layers: int = 2) -> None:
        super().__init__()
        sizes = set(input_sizes.values())
        self.projections = nn.ModuleDict(
            {name: nn.Linear(size, hidden_size) for name, size in input_sizes.items()} if len(sizes) > 1 else {}
        )
        widths = [hidden_size if len(sizes) > 1 else next(iter(sizes)), *[hidden_size] * (num_layers - 1), 1]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])  # the score itself is linear

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model that holds the gate, but keep fp32 where that model is cast to another type."""

        def keep_type(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_type, recurse)  # type: ignore[no-untyped-call]
        return self

    def score(self, hidden: Float[Tensor, "*rows H"], name: str) -> Float[Tensor, "*rows"]:
        """Score one specialist's hidden states."""
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            hidden = hidden.float()
            if name in self.projections:
                hidden = self.projections[name](hidden)
            scores: Tensor = self.layers(hidden).squeeze(-1)
            return scores

    def forward(self, hiddens: Sequence[Float[Tensor, "*rows _"]], names: Sequence[str]) -> Float[Tensor, "*rows N"]:
        """Scores of all specialists, before the softmax."""
        return torch.stack([self.score(hidden, name) for hidden, name in zip(hiddens, names, strict=True)], dim=-1)


def count_gate_parameters(input_sizes: Mapping[str, int], settings: GateConfig) -> int:
    """Parameters of the gate of specialists with such hidden sizes, without making it."""
    with torch.device("meta"):
        gate = Gate(input_sizes, hidden_size=settings.hidden_size, num_layers=settings.num_layers)
    return sum(parameter.numel() for parameter in gate.parameters())
