"""A fused model of which only the gate and the heads are in memory; the specialists are loaded one at a time.

What a gate is trained on is the specialists' last hidden states. Once these are known, a specialist is its head.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ultrafuser.config.recipe import Recipe, SpecialistConfig
from ultrafuser.errors import ModelError
from ultrafuser.model.backbone import check_backbone
from ultrafuser.model.build import fuse_models, recipe_options
from ultrafuser.model.configuration import check_name
from ultrafuser.model.specialist import load_specialist, load_tokenizer, state_digest
from ultrafuser.model.vocabulary import check_vocabularies, trim_vocabulary

if TYPE_CHECKING:
    from ultrafuser.model.fused import FusedForCausalLM


class NoBackbone(nn.Module):
    """Stands where a backbone was."""


@dataclass(frozen=True, slots=True)
class SpecialistFacts:
    """What of a specialist must be known while it is not in memory.

    Attributes:
        digest: Content hash of all its weights.
        dtype: Of its weights.
        hidden_size: Width of its last hidden state.
        num_parameters: Of its backbone.
        dropout: Its first dropout that is not zero, as `name value`; None: it has none.
    """

    digest: str
    dtype: torch.dtype
    hidden_size: int
    num_parameters: int
    dropout: str | None


def describe_specialist(specialist: PreTrainedModel) -> SpecialistFacts:
    """The facts of a whole specialist."""
    config = specialist.config.get_text_config()
    dropouts = {key: value for key, value in config.to_dict().items() if key.endswith(("dropout", "pdrop"))}
    active = [f"{key} {value}" for key, value in dropouts.items() if isinstance(value, float) and value > 0]
    return SpecialistFacts(
        digest=state_digest(specialist),
        dtype=specialist.dtype,
        hidden_size=int(specialist.get_output_embeddings().weight.shape[1]),
        num_parameters=sum(parameter.numel() for parameter in specialist.base_model.parameters()),
        dropout=active[0] if active else None,
    )


def take_backbone_out(specialist: PreTrainedModel) -> PreTrainedModel:
    """Leave a specialist its head alone, in place, with a copy of its weights.

    What a loader reads may be part of a mapping of the whole file, which would stay in memory with it.
    """
    head: Any = specialist.get_output_embeddings()
    for name, parameter in list(head.named_parameters(recurse=False)):
        setattr(head, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    setattr(specialist, specialist.base_model_prefix, NoBackbone())
    # Its own way to the head may pass by the embeddings, which are gone.
    specialist.get_output_embeddings = lambda: head  # type: ignore[method-assign]
    return specialist


def is_lean(specialist: nn.Module) -> bool:
    """Whether its backbone was taken out."""
    return isinstance(getattr(specialist, "base_model", None), NoBackbone)


class SpecialistLoader:
    """Loads any one of a recipe's specialists as a fused model would hold it.

    Args:
        specialists: Where they are, by name, in order.
        dtype: Of the weights in memory.
        device: Where they run.
    """

    def __init__(self, specialists: Mapping[str, SpecialistConfig], *, dtype: torch.dtype, device: torch.device):
        self.specialists = dict(specialists)
        self.dtype, self.device = dtype, device
        self.rows: int | None = None  # of the vocabulary that all share, once known
        self.facts: dict[str, SpecialistFacts] = {}

    def load(self, name: str) -> PreTrainedModel:
        """A whole specialist on the device, ready to run.

        Raises:
            ModelError: It cannot be loaded, or its weights are no longer those it was described with.
        """
        specialist = load_specialist(self.specialists[name], name=name, dtype=self.dtype)
        if self.rows is not None:
            trim_vocabulary({name: specialist}, size=self.rows)
        if name in self.facts and state_digest(specialist) != self.facts[name].digest:
            raise ModelError(
                f"the weights of specialist {name!r} in {self.specialists[name].model} were replaced during the run: "
                "restore them, or start again"
            )
        moved: Any = specialist
        return moved.to(self.device).eval()  # type: ignore[no-any-return]

    def release(self, specialist: PreTrainedModel) -> None:
        """Give the memory of a loaded specialist back, whoever still refers to it."""
        take_backbone_out(specialist)
        gc.collect()


def build_lean(
    cls: type[FusedForCausalLM], recipe: Recipe, loader: SpecialistLoader, *, tokenizer: Any
) -> FusedForCausalLM:
    """Fuse a recipe's specialists as they are on disk, keeping the gate and the heads; the gate is new.

    Args:
        cls: `FusedForCausalLM` or a subclass.
        recipe: Says how to fuse.
        loader: Loads the specialists, one at a time; it learns their `facts` and `rows` on the way.
        tokenizer: The shared tokenizer.

    Raises:
        ModelError: A specialist cannot be loaded or fused.
        VocabularyError: A token differs between specialists.
    """
    tokenizers: dict[str, Any] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for name, source in loader.specialists.items():
        check_name(name)
        with suppress(ModelError):  # one without a tokenizer of its own is taken on trust, as everywhere
            tokenizers[name] = load_tokenizer(source, name=name)
    heads: dict[str, PreTrainedModel] = {}
    # Not before all are seen is it known how many rows they share; those that have more are then read once more.
    for name in loader.specialists:
        heads[name] = _read_head(loader, name, sizes)
    loader.rows = min(head for head, _ in sizes.values())
    check_vocabularies({"reference": tokenizer, **tokenizers}, size=loader.rows)
    for name, size in sizes.items():
        if set(size) != {loader.rows}:
            del loader.facts[name]
            heads[name] = _read_head(loader, name, {})
    model: Any = fuse_models(
        cls,
        heads,
        loader.specialists,
        tokenizers,
        templates={name: source.template for name, source in loader.specialists.items()},
        tokenizer=tokenizer,
        rows=loader.rows,
        seed=recipe.seed,
        **recipe_options(recipe),
    )
    for part in model.config.sources:  # what a gate-only folder refers to
        facts = loader.facts[part["name"]]
        part |= {"digest": facts.digest, "dtype": str(facts.dtype).removeprefix("torch.")}
    return model  # type: ignore[no-any-return]


def _read_head(loader: SpecialistLoader, name: str, sizes: dict[str, tuple[int, int]]) -> PreTrainedModel:
    """Load one specialist, note its facts and rows (of head, of embeddings), and keep its head."""
    specialist = loader.load(name)
    check_backbone(specialist, name)
    embeddings: Any = specialist.get_input_embeddings()
    sizes[name] = (int(specialist.get_output_embeddings().weight.shape[0]), int(embeddings.weight.shape[0]))
    loader.facts[name] = describe_specialist(specialist)
    loader.release(specialist)
    return specialist
