"""FusedRank: the fused model as one of n processes sees it: its own specialist, the gate, and the others' place.

Shapes: B rows, T columns, M response tokens, N specialists, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ultrafuser.config.recipe import Recipe
from ultrafuser.errors import ModelError
from ultrafuser.model.backbone import check_backbone
from ultrafuser.model.build import assemble, fuse_models, recipe_options
from ultrafuser.model.cache import FusedCache
from ultrafuser.model.configuration import check_name
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.loss import LinearHead, TokenLoss
from ultrafuser.model.outline import outline
from ultrafuser.model.specialist import load_specialist, load_tokenizer
from ultrafuser.model.specialist_group import SpecialistGroup, group_loss
from ultrafuser.model.vocabulary import check_vocabularies, trim_vocabulary


class Elsewhere(nn.Module):
    """Stands for a specialist that another process holds.

    Attributes:
        config: Of the specialist.
        generation_config: Of the specialist.
        dtype: Of its weights.
    """

    def __init__(self, config: PreTrainedConfig, generation_config: GenerationConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.generation_config, self.dtype = config, generation_config, dtype

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Whoever asks this of all specialists means the one that runs."""


class FusedRank(FusedForCausalLM):
    """One process's part of a fused model, for training: `response_nll` gives the loss and weights of all specialists.

    Its parameters are those of its own specialist, under their names in the whole model, and the gate's. The gradient
    of the gate is this specialist's part: the sum over the group is that of the whole model.
    """

    group: SpecialistGroup

    @classmethod
    def of(cls, model: FusedForCausalLM, group: SpecialistGroup) -> Self:
        """One process's part of a model, which keeps of its specialists this one alone, and shares it and the gate.

        Raises:
            ModelError: The specialist's head is not one linear layer, or logits are not fused as in Equation 1.
        """
        if model.config.fusion_space != "logits" or model.config.solo is not None:
            raise ModelError("specialists in processes of their own are fused by all in the space logits alone")
        own = model.names[group.index]
        if not isinstance(model.loss_head(own), LinearHead):
            raise ModelError(
                f"the head of specialist {own!r} is not one linear layer, so its logits cannot be added to those "
                "of other processes: set train.parallel.mode: fsdp"
            )
        for name, specialist in model.specialists.items():
            if name != own and not isinstance(specialist, Elsewhere):
                model.specialists[name] = Elsewhere(specialist.config, specialist.generation_config, specialist.dtype)
        part: Any = assemble(cls, model.config, dict(model.specialists.items()), seed=0)
        part.fusion_gate, part.group = model.fusion_gate, group
        return part  # type: ignore[no-any-return]

    @property
    def own_name(self) -> str:
        """The specialist that this process holds."""
        return self.names[self.group.index]

    @property
    def active_names(self) -> list[str]:
        """The specialist that runs here."""
        return [self.own_name]

    def _scores(
        self, hiddens: Mapping[str, Tensor], views: Mapping[str, tuple[Tensor, Any]], cache: FusedCache | None
    ) -> Tensor:
        scores = super()._scores(hiddens, views, cache)
        return scores if scores.shape[-1] == len(self.names) else self.group.gather_scores(scores[..., 0])

    def token_loss(
        self,
        rows: Mapping[str, Float[Tensor, "M _"]],
        weights: Float[Tensor, "M N"],
        targets: Int[Tensor, " M"],
        *,
        details: bool = False,
    ) -> TokenLoss:
        """Loss under all specialists, from the hidden states of this process's own."""
        hidden, head = rows[self.own_name], self.loss_head(self.own_name)
        assert isinstance(head, LinearHead)
        return group_loss(
            hidden,
            weights,
            targets,
            head,
            self.group,
            vocabulary=self.config.vocab_size,
            chunk=self.loss_chunk,
            details=details,
        )


def build_part(recipe: Recipe, loads: Sequence[str], *, tokenizer: Any) -> FusedForCausalLM:
    """Fuse a recipe's specialists with the weights of some alone; the others have shapes and no memory (meta device).

    Args:
        recipe: Says what to fuse, and how.
        loads: Names of those whose weights are read.
        tokenizer: The shared one.

    Raises:
        ModelError: A specialist cannot be loaded or fused.
        VocabularyError: A token differs between specialists.
    """
    models: dict[str, PreTrainedModel] = {}
    tokenizers: dict[str, Any] = {}
    dtype = getattr(torch, recipe.dtype)
    for name, source in recipe.specialists.items():
        check_name(name)
        if name in loads:
            models[name] = load_specialist(source, name=name, dtype=dtype)
            check_backbone(models[name], name)
        else:
            models[name] = outline(source, name=name).to(dtype)
        with suppress(ModelError):  # one without a tokenizer of its own is taken on trust, as everywhere
            tokenizers[name] = load_tokenizer(source, name=name)
    rows = trim_vocabulary(models)
    check_vocabularies({"reference": tokenizer, **tokenizers}, size=rows)
    model: FusedForCausalLM = fuse_models(
        FusedForCausalLM,
        models,
        recipe.specialists,
        tokenizers,
        templates={name: source.template for name, source in recipe.specialists.items()},
        tokenizer=tokenizer,
        rows=rows,
        seed=recipe.seed,
        **recipe_options(recipe),
    )
    return model
