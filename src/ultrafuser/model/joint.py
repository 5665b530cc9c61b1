"""One forward for all specialists of a shared base: n x B rows through one backbone, each with its own adapter.

The joint model has modules of its own over the very parameters of the specialists, so gradients reach the adapters and
a change of any weight is seen here. What is row by row in a backbone, and that is everything but adapted layers, never
knows that rows belong to different specialists.

Shapes: B rows of a batch, T columns, N specialists, H hidden size. Rows lie specialist by specialist: [N * B, ...].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from ultrafuser.errors import ModelError
from ultrafuser.model.backbone import last_hidden_state
from ultrafuser.model.columns import visible_positions
from ultrafuser.model.lora import lora_layers, low_rank_update, share_weights


class JointLinear(nn.Module):
    """A linear layer whose rows get the low-rank updates of n specialists, an equal number of rows each.

    Args:
        base_layer: Of all specialists.
        layers: Each specialist's adapted layer, in order; None: it has none here.
    """

    def __init__(self, base_layer: nn.Module, layers: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layers = list(layers)  # not registered: they belong to the specialists

    def forward(self, x: Float[Tensor, "rows *columns I"]) -> Float[Tensor, "rows *columns O"]:
        """The base layer once for all rows, then each specialist's update of its own rows."""
        result: Tensor = self.base_layer(x)
        parts = zip(result.chunk(len(self.layers)), x.chunk(len(self.layers)), self.layers, strict=True)
        return torch.cat(
            [y if layer is None else (y + low_rank_update(layer, own)).to(y.dtype) for y, own, layer in parts]
        )


def build_joint(specialists: Mapping[str, PreTrainedModel]) -> PreTrainedModel:
    """The joint model of specialists that share one base (`shared_base.share_base`)."""
    first = next(iter(specialists.values()))
    joint = share_weights(first)
    layers = {name: dict(lora_layers(specialist)) for name, specialist in specialists.items()}
    for place in dict.fromkeys(place for own in layers.values() for place in own):
        parent, _, leaf = place.rpartition(".")
        adapted = [own.get(place) for own in layers.values()]
        base_layer = next(layer for layer in adapted if layer is not None).get_base_layer()
        setattr(joint.get_submodule(parent), leaf, JointLinear(base_layer, adapted))
    joint.train(first.training)
    return joint


def joint_hidden_states(
    joint: PreTrainedModel,
    views: Mapping[str, tuple[Tensor, Any]],
    positions: Mapping[str, Tensor | None],
    *,
    past_length: int | Tensor = 0,
    cache: Any = None,
) -> dict[str, Float[Tensor, "B T H"]]:
    """Last hidden states of every specialist, in one forward.

    Args:
        joint: Made by `build_joint` of these specialists, in this order.
        views: Ids [B, T] and mask of each.
        positions: Of each; None: counted over real tokens.
        past_length: Columns that the cache holds.
        cache: Of N * B rows; advanced.

    Raises:
        ModelError: Masks of different kinds.
    """
    masks = [mask for _, mask in views.values()]
    if not (all(mask is None for mask in masks) or all(isinstance(mask, Tensor) for mask in masks)):
        raise ModelError("specialists of a shared base that run as one need masks of one kind: all tensors, or none")
    ids = torch.cat([ids for ids, _ in views.values()])
    mask = None if masks[0] is None else torch.cat(masks)
    own = [positions[name] for name in views]
    counted = visible_positions(mask, ids, past_length) if any(p is None for p in own) else None
    given = counted if counted is not None else torch.cat([p for p in own if p is not None])
    hidden = last_hidden_state(joint, ids, attention_mask=mask, position_ids=given, cache=cache)
    return dict(zip(views, hidden.chunk(len(views)), strict=True))


@torch.no_grad()
def runs_jointly(specialists: Mapping[str, PreTrainedModel]) -> bool:
    """Whether one forward of all gives what each gives alone, on a few tokens; some architectures resist."""
    first = next(iter(specialists.values()))
    training = {name: specialist.training for name, specialist in specialists.items()}
    for specialist in specialists.values():
        specialist.eval()
    ids = torch.arange(1, 5, device=first.device)[None]
    joint = build_joint(specialists)
    together = joint_hidden_states(joint, dict.fromkeys(specialists, (ids, None)), dict.fromkeys(specialists))
    alone = {
        name: last_hidden_state(specialist, ids, position_ids=visible_positions(None, ids, 0))
        for name, specialist in specialists.items()
    }
    for name, specialist in specialists.items():
        specialist.train(training[name])
    tolerance = 1e-3 if first.dtype == torch.float32 else 5e-2
    return all(
        torch.allclose(together[name], hidden, atol=tolerance * max(1.0, hidden.abs().max().item()))
        for name, hidden in alone.items()
    )
