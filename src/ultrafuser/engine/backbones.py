"""Backbones: what runs specialists over a slot cache; here the one for any architecture, one specialist at a time.

The model's own layers run; only the cache is ours. Whether an architecture plays along (takes a mask and positions,
keeps keys and values and nothing else) is checked by running it (`proof.check_backbone`), not guessed.

Shapes: G specialists of a backbone, B choices, T new tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ultrafuser.engine.slots import SlotCache, SlotView
from ultrafuser.errors import ModelError
from ultrafuser.model.backbone import head_logits, last_hidden_state


class Backbone(Protocol):
    """One or more specialists over one slot cache."""

    num_members: int
    device: torch.device
    cache_dtype: torch.dtype  # of keys and values

    @property
    def kv_heads(self) -> list[tuple[int, int]]:
        """Heads and their size of each layer."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Weights that one pass reads."""
        ...

    def hidden(
        self,
        ids: Int[Tensor, "G B T"],
        starts: Int[Tensor, "G B"],
        cache: SlotCache,
        slots: Sequence[int],
        member: int | None = None,
    ) -> Float[Tensor, "G B T H"]:
        """Last hidden states of new tokens."""
        ...

    def logits(self, hidden: Float[Tensor, "G M H"], member: int | None = None) -> Float[Tensor, "G M V"]:
        """Logits of hidden states."""
        ...


class ModelBackbone:
    """One specialist, whatever its architecture.

    Args:
        model: The specialist.
        name: Of the specialist, for errors.

    Raises:
        ModelError: It keeps no keys and values of a kind that a slot can hold.
    """

    num_members = 1

    def __init__(self, model: PreTrainedModel, *, name: str) -> None:
        self.model = model
        self.device, self.cache_dtype = model.device, model.dtype
        self.hidden_size = model.get_output_embeddings().weight.shape[1]
        self.kv_heads = _probe_heads(model, name)

    @property
    def weight_bytes(self) -> int:
        """Weights that one pass reads: all, and not the embeddings where the head is another matrix."""
        total = sum(p.numel() * p.element_size() for p in self.model.parameters())
        inputs: Any = self.model.get_input_embeddings()
        outputs: Any = self.model.get_output_embeddings()
        tied = inputs.weight is outputs.weight
        return int(total if tied else total - inputs.weight.numel() * inputs.weight.element_size())

    @torch.no_grad()
    def hidden(
        self,
        ids: Int[Tensor, "1 B T"],
        starts: Int[Tensor, "1 B"],
        cache: SlotCache,
        slots: Sequence[int],
        member: int | None = None,
    ) -> Float[Tensor, "1 B T H"]:
        """As `LlamaStack.hidden`, for one member."""
        del member
        view = SlotView(cache, slots, None, starts[0], ids.shape[2])
        hidden = last_hidden_state(
            self.model,
            ids[0],
            attention_mask=self._masks(view),
            position_ids=view.positions,
            cache=_StepCache(view, len(self.kv_heads)),
        )
        return hidden[None]

    def logits(self, hidden: Float[Tensor, "1 M H"], member: int | None = None) -> Float[Tensor, "1 M V"]:
        """Logits."""
        del member
        return head_logits(self.model, hidden)

    def _masks(self, view: SlotView) -> Any:
        """One mask, or one for each kind of layer as architectures with several kinds take them."""
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())

        def mask(kind: str) -> Tensor:
            length = window if kind == "sliding_attention" else None
            made = view.mask(length)
            if made is None:
                made = torch.ones((1, 1, 1, view.stop), dtype=torch.bool, device=view.positions.device)
            if config._attn_implementation == "eager":  # adds its mask to the scores
                dtype = self.cache_dtype
                return torch.zeros(made.shape, dtype=dtype, device=made.device).masked_fill(
                    ~made, torch.finfo(dtype).min
                )
            return made

        if len(kinds) > 1:
            return {kind: mask(kind) for kind in kinds}
        only = next(iter(kinds), "sliding_attention" if config.model_type == "mistral" and window else "full_attention")
        return mask(only)


class _StepCache(Cache):
    """What a layer of transformers sees of the slots during one forward."""

    def __init__(self, view: SlotView, num_layers: int) -> None:
        super().__init__(layers=[])
        self.view = view
        self.num_layers = num_layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new columns and give all."""
        self.view.write(layer_idx, key_states, value_states)
        return self.view.read(layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before the new ones."""
        del layer_idx
        return self.view.stop - self.view.num_new

    def __len__(self) -> int:
        return self.num_layers


@torch.no_grad()
def _probe_heads(model: PreTrainedModel, name: str) -> list[tuple[int, int]]:
    """Heads and their size of each layer, as they come out of a forward over one token."""
    output = model.base_model(input_ids=torch.ones((1, 1), dtype=torch.long, device=model.device), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", None)
    shapes = [getattr(layer, "keys", None) for layer in layers or ()]
    if not shapes or any(not isinstance(keys, Tensor) or keys.dim() != 4 for keys in shapes):
        raise ModelError(
            f"specialist {name!r} is a {type(model).__name__}, which keeps other things than keys and values: the "
            "engine cannot run it. Use FusedGenerator, which runs any architecture."
        )
    return [(int(keys.shape[1]), int(keys.shape[3])) for keys in shapes if isinstance(keys, Tensor)]
