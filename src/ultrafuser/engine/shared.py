"""Specialists that are adapters of one base, in one pass: the base is in memory once and is read once.

The rows of all specialists go through one product with the base's weight; each then gets what its own adapter adds
(`low_rank.py`). Norms, embeddings and the head are the base's: the head's product over the weighted sum of hidden
states is the weighted sum of the logits, so the fused logits of a token cost one row of it.

Shapes: G specialists, B choices, M rows of each, T new tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ultrafuser.engine.few_rows import Matrix
from ultrafuser.engine.llama import LlamaStack
from ultrafuser.engine.low_rank import Arena, LowRank, adapters_of, base_of, has_adapter, lay_out
from ultrafuser.engine.weights import AnyFormat, Product, make_product
from ultrafuser.model.lora import ADAPTER_NAME, lora_layers

_KNOWN = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")


class SharedProduct:
    """Rows of all specialists times the weight of their base, and what their adapters add.

    Args:
        base: Of the base's layers.
        low_rank: Of the adapters, or None where there are none.
    """

    def __init__(self, base: Product, low_rank: LowRank | None) -> None:
        self.base, self.low_rank = base, low_rank
        self.matrix: Matrix | None = base.matrix
        if base.matrix is not None and low_rank is not None:
            self.matrix = base.matrix._replace(adapters=low_rank.adapters)
        self.is_copy = base.is_copy
        self.num_bytes = base.num_bytes + (low_rank.num_bytes if low_rank is not None else 0)

    def __call__(self, x: Float[Tensor, "G M I"], member: int | None = None) -> Float[Tensor, "G M O"]:
        """[G, M, I] to [G, M, O]; with `member` both have one specialist."""
        y = self.base(x.reshape(1, -1, x.shape[-1]))
        y = y.view(*x.shape[:2], y.shape[-1])
        if self.low_rank is not None:
            self.low_rank.add_to(y, x, member)
        return y


class SharedStack(LlamaStack):
    """G specialists of one base; see `LlamaStack` for what it takes."""

    def __init__(self, models: Sequence[PreTrainedModel], **options: Any) -> None:
        adapted = [layer for model in models for _, layer in lora_layers(model)]
        self._arena = Arena(sum(linear.weight.numel() for layer in adapted for linear in adapters_of(layer)))
        super().__init__(models, **options)

    def fused_logits(self, hidden: Float[Tensor, "G M H"], weights: Float[Tensor, "M G"]) -> Float[Tensor, "M V"]:
        """Logits of some or all specialists, weighted and added up (Equation 1), of one row of the head for each.

        Args:
            hidden: Of those that count.
            weights: Theirs.
        """
        mixed = torch.einsum("gmh,mg->mh", hidden.float(), weights)
        return self.head(mixed[None].to(self.compute_dtype))[0].float()

    def _product(
        self, parts: list[list[Any]], form: AnyFormat, *, num_threads: int, pack: bool
    ) -> tuple[Product, list[Any]]:
        layers = [layer for column in parts for layer in column]
        bases = [base_of(layer) for layer in layers]
        base = make_product([[base_of(layer) for layer in parts[0]]], form, num_threads=num_threads, pack=pack)
        low_rank: LowRank | None = None
        if any(map(has_adapter, layers)):
            made = lay_out(parts)
            low_rank = LowRank(made, form, self.compute_dtype, num_threads=num_threads, arena=self._arena)
        copied = bases if base.is_copy else []
        return SharedProduct(base, low_rank), [*copied, *(low_rank.copied if low_rank is not None else ())]

    def _stacked(self, weights: Sequence[Tensor]) -> Float[Tensor, "1 1 _"]:
        return super()._stacked(weights[:1])

    def _embed(self, ids: Int[Tensor, "G B T"], member: int | None) -> Float[Tensor, "G B T H"]:
        del member
        embedded: Tensor = self.embeddings[0](ids)
        return embedded


def is_adapted(model: PreTrainedModel) -> bool:
    """Whether a model has adapters that are not merged."""
    return any(True for _ in lora_layers(model))


def have_one_base(models: Sequence[PreTrainedModel]) -> bool:
    """Whether models are adapters of one base that is in memory once."""
    bases = [_base_parameters(model) for model in models]
    return any(map(is_adapted, models)) and all(base == bases[0] for base in bases)


def has_known_adapters(model: PreTrainedModel) -> bool:
    """Whether all adapters of a Llama-like model are plain ones, at work, of the linear layers of its blocks."""
    return all(_is_plain(layer) and _KNOWN.fullmatch(place) for place, layer in lora_layers(model))


def _is_plain(layer: Any) -> bool:
    return (
        type(layer).__name__ == "Linear"  # peft has subclasses for quantised and parallel layers
        and list(layer.lora_A) == [ADAPTER_NAME] == list(layer.active_adapters)
        and not (layer.merged or layer.disable_adapters or layer.fan_in_fan_out or layer.lora_variant)
        and layer.lora_B[ADAPTER_NAME].bias is None
    )


def _base_parameters(model: PreTrainedModel) -> set[int]:
    adapters = {id(p) for _, layer in lora_layers(model) for n, p in layer.named_parameters() if "lora_" in n}
    return {id(parameter) for parameter in model.parameters()} - adapters
