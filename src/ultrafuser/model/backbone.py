"""One specialist seen as two parts: a backbone that gives last hidden states, a head that turns them into logits.

Works for any causal LM of transformers whose head is one linear layer, whatever follows it of the known
kinds (soft capping, scaling); `check_backbone` proves it for a given model or refuses it.

Shapes: B rows, T columns, H hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ultrafuser.errors import ModelError
from ultrafuser.model.loss import LinearHead

# A plain dictionary, since torch.compile cannot trace `lru_cache`.
_TAKES_POSITION_IDS: dict[type, bool] = {}


def _takes_position_ids(backbone: type[torch.nn.Module]) -> bool:
    if backbone not in _TAKES_POSITION_IDS:
        _TAKES_POSITION_IDS[backbone] = "position_ids" in inspect.signature(backbone.forward).parameters
    return _TAKES_POSITION_IDS[backbone]


def last_hidden_state(
    specialist: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    *,
    attention_mask: Any = None,
    position_ids: Int[Tensor, "B T"] | None = None,
    cache: Cache | None = None,
) -> Float[Tensor, "B T H"]:
    """The hidden states that the head reads, advancing `cache` where one is given.

    Padding may stand anywhere. Without a cache it is moved behind the visible tokens, since a sliding window or ALiBi
    would count columns of padding between them; the hidden states come back in the columns of `input_ids`.
    """
    backbone = specialist.base_model
    order: Tensor | None = None
    if cache is None and isinstance(attention_mask, Tensor) and attention_mask.shape == input_ids.shape:
        order = attention_mask.long().argsort(dim=1, descending=True, stable=True)
        input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
        position_ids = position_ids.gather(1, order) if position_ids is not None else None
    positions = {"position_ids": position_ids} if _takes_position_ids(type(backbone)) else {}
    output = backbone(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        # Without a cache this must be said: the default is True outside training and costs a cache nobody reads.
        use_cache=cache is not None,
        return_dict=True,
        **positions,
    )
    hidden: Tensor = output.last_hidden_state
    if order is not None:
        hidden = hidden.gather(1, order.argsort(dim=1).unsqueeze(-1).expand_as(hidden))
    return hidden


def head_logits(specialist: PreTrainedModel, hidden: Float[Tensor, "*rows H"]) -> Float[Tensor, "*rows V"]:
    """Logits from hidden states: the linear head, then what the architecture does to its output."""
    logits: Tensor = specialist.get_output_embeddings()(hidden)
    config = specialist.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


def linear_head(specialist: PreTrainedModel) -> LinearHead | None:
    """The head as tensors, where it is one linear layer and nothing else; None where calling it does more than that."""
    layer: Any = specialist.get_output_embeddings()
    config = specialist.config.get_text_config()
    # Adapters and quantised layers are of other classes; offloading replaces the forward, others hang hooks to it.
    changed = "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
    if type(layer) is not nn.Linear or changed or getattr(config, "final_logit_softcapping", None):
        return None
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return LinearHead(layer.weight, layer.bias, scale)


@torch.no_grad()
def check_backbone(specialist: PreTrainedModel, name: str) -> None:
    """Run four tokens both ways: through backbone and head, and through the model itself.

    Raises:
        ModelError: The architecture has no single backbone and head, or changes its logits in a way unknown here.
    """
    kind = type(specialist).__name__
    if specialist.base_model is specialist or specialist.get_output_embeddings() is None:
        raise ModelError(f"specialist {name!r} is a {kind}, which is no causal LM with a backbone and one head")
    was_training = specialist.training
    specialist.eval()
    input_ids = torch.arange(1, 5, device=specialist.device)[None]
    expected = specialist(input_ids=input_ids, use_cache=False).logits.float()
    positions = torch.arange(4, device=specialist.device)[None]
    actual = head_logits(specialist, last_hidden_state(specialist, input_ids, position_ids=positions)).float()
    specialist.train(was_training)
    tolerance = 1e-3 * max(1.0, expected.abs().max().item())
    if actual.shape != expected.shape or not torch.allclose(actual, expected, atol=tolerance):
        raise ModelError(
            f"specialist {name!r} is a {kind}, whose logits are not those of its head: it cannot be fused by its last "
            "hidden state. Leave it out, or report the architecture."
        )
