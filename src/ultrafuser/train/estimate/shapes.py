"""One specialist in numbers, from its configuration alone.

Source of the sizes: the parameters of the architecture on torch's meta device, which have shapes and no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ultrafuser.config.recipe import Recipe, SpecialistConfig
from ultrafuser.config.training import LoraConfig
from ultrafuser.errors import ModelError
from ultrafuser.model.gate import count_gate_parameters
from ultrafuser.model.outline import outline


@dataclass(frozen=True, slots=True)
class Shape:
    """One specialist.

    Attributes:
        name: As the recipe names it.
        architecture: `model_type` of its configuration.
        num_parameters: All, a tied head counted once.
        vocabulary: Rows of the head.
        hidden_size: Of the last hidden state.
        intermediate_size: Width of the inner layer of a decoder layer.
        query_size: Width of all queries of a layer.
        key_size: Width of all keys of a layer.
        num_heads: Of the queries.
        num_layers: Decoder layers.
        layer_parameters: Of one decoder layer, on average.
        is_tied: Whether head and embeddings are one matrix.
        is_gated: Whether the inner layer is a gated one, as in Llama.
        is_rms: Whether layers are normed by RMSNorm, as in Llama.
        saved_bytes: Of one weight in its files.
        linears: Name, inputs and outputs of every linear layer but the head.
    """

    name: str
    architecture: str
    num_parameters: int
    vocabulary: int
    hidden_size: int
    intermediate_size: int
    query_size: int
    key_size: int
    num_heads: int
    num_layers: int
    layer_parameters: int
    is_tied: bool
    is_gated: bool
    is_rms: bool
    saved_bytes: int
    linears: tuple[tuple[str, int, int], ...]

    @property
    def head_parameters(self) -> int:
        """Of the head's matrix."""
        return self.vocabulary * self.hidden_size

    @property
    def layers_parameters(self) -> int:
        """Of all decoder layers."""
        return self.num_layers * self.layer_parameters

    @property
    def is_llama_like(self) -> bool:
        """Whether the arithmetic of activations is that of its very operations; else it is a rule of thumb."""
        return self.is_gated and self.is_rms

    def adapter_parameters(self, lora: LoraConfig) -> int:
        """Parameters of low-rank adapters."""
        wanted = lora.targets
        chosen = [
            inputs + outputs
            for name, inputs, outputs in self.linears
            if wanted == "all-linear" or name.rsplit(".", 1)[-1] in wanted or name in wanted
        ]
        return lora.rank * sum(chosen)


def read_shape(source: SpecialistConfig, *, name: str) -> Shape:
    """The numbers of one specialist; its weights are not touched, and need not exist.

    Raises:
        ModelError: It has no configuration, or none of a causal LM with decoder layers and one head.
    """
    model = outline(source, name=name)
    config: Any = model.config.get_text_config()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    layers = _decoder_layers(model.base_model)
    if head is None or layers is None:
        raise ModelError(
            f"specialist {name!r} is a {type(model).__name__}, which is no causal LM with layers and a head"
        )
    hidden = int(head.weight.shape[1])
    num_heads = int(getattr(config, "num_attention_heads", 0) or 1)
    key_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    head_size = int(getattr(config, "head_dim", None) or hidden // num_heads)
    kinds = {type(module).__name__ for module in layers.modules()}
    return Shape(
        name=name,
        architecture=str(model.config.model_type),
        num_parameters=_count(model),
        vocabulary=int(head.weight.shape[0]),
        hidden_size=hidden,
        intermediate_size=int(_first(config, ("intermediate_size", "ffn_dim", "n_inner"), 4 * hidden)),
        query_size=num_heads * head_size,
        key_size=key_heads * head_size,
        num_heads=num_heads,
        num_layers=len(layers),
        layer_parameters=_count(layers) // len(layers),
        is_tied=head.weight is embeddings.weight,
        is_gated=any("gate_proj" in part or "gate_up_proj" in part for part, _ in layers.named_modules()),
        is_rms=any("RMSNorm" in kind for kind in kinds),
        saved_bytes=dtype.itemsize if isinstance(dtype := model.config.dtype, torch.dtype) else 4,
        linears=tuple(
            (part, int(module.weight.shape[1]), int(module.weight.shape[0]))
            for part, module in layers.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        ),
    )


def gate_parameters(shapes: Sequence[Shape], recipe: Recipe) -> int:
    """Parameters of the gate that a recipe asks for; none beside a lone specialist."""
    if len(shapes) < 2:
        return 0
    return count_gate_parameters({shape.name: shape.hidden_size for shape in shapes}, recipe.gate)


def _decoder_layers(backbone: nn.Module) -> nn.ModuleList | None:
    """The longest list of modules: every causal LM of transformers keeps its layers in one."""
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return max(lists, key=_count, default=None)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _first(config: Any, names: tuple[str, ...], default: int) -> int:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), default)
