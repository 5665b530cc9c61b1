"""Adapters for a stage that trains them: new ones where a specialist has none, in fp32 whatever its weights are in."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection
from typing import Any

import torch

from ultrafuser.config.recipe import Recipe, SpecialistConfig
from ultrafuser.config.training import LoraConfig
from ultrafuser.errors import ConfigError
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.lora import Adapter, add_adapter, has_adapter, is_adapter
from ultrafuser.model.outline import outline, resolve_adapter
from ultrafuser.model.shared_base import find_base


def give_adapters(
    model: FusedForCausalLM, settings: LoraConfig, *, seed: int, only: Collection[str] | None = None
) -> None:
    """Put a new adapter into each specialist that has none (of all, or of some); an adapter that is there is kept.

    New adapters change nothing yet, and are the same for the same seed and name.

    Args:
        model: Changed in place.
        settings: Of new adapters.
        seed: Of their weights.
        only: Names of specialists; None: all.

    Raises:
        ModelError: A target is no linear layer of the backbone.
    """
    for name in model.names if only is None else only:
        specialist: Any = model.specialists[name]
        if not has_adapter(specialist):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()))
                add_adapter(specialist, new_adapter(settings), name=name)
        for key, parameter in specialist.named_parameters():
            if is_adapter(key):
                parameter.data = parameter.data.float()
    model.forget_joint()


def new_adapter(settings: LoraConfig) -> Adapter:
    """An adapter with new weights, as peft has it."""
    from peft import LoraConfig as PeftConfig

    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    alpha: Any = settings.alpha  # peft asks for a whole number and takes any
    return Adapter(PeftConfig(r=settings.rank, lora_alpha=alpha, lora_dropout=settings.dropout, target_modules=targets))


def check_adapted_stages(recipe: Recipe) -> None:
    """Refuse what adapters cannot do, from configurations alone.

    Raises:
        ConfigError: A setting that does not go with another, or peft is not installed.
        ModelError: Specialists have no base in common, an adapter does not fit, or a target is not there.
    """
    stages = {"stage1": recipe.stage1, "stage2": recipe.stage2}
    tuned = {f"specialists.{name}.tune": source.tune for name, source in recipe.specialists.items()}
    wanted = {place: stage.lora for place, stage in {**stages, **tuned}.items() if stage is not None and stage.lora}
    if not wanted and not recipe.shared_base:
        return
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{next(iter(wanted), 'shared_base')} needs peft: pip install 'ultrafuser[peft]'") from error
    if recipe.shared_base:
        find_base(recipe.specialists)
    for name, source in recipe.specialists.items():
        if not recipe.shared_base and source.tune is not None and source.tune.lora and _is_adapter_already(source):
            raise ConfigError(
                f"specialists.{name}.tune.lora would make an adapter of {source.model} with an adapter, which is no "
                "model on disk: set shared_base: true to train that adapter on, or merge it first"
            )
        for place, settings in wanted.items():
            if place in stages or place == f"specialists.{name}.tune":
                with torch.device("meta"), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # said once, when it is done in earnest
                    add_adapter(outline(source, name=name), new_adapter(settings), name=name)


def refuse_several_processes(recipe: Recipe, *, num_processes: int) -> None:
    """Several processes train adapters by FSDP2, each over weights of its own.

    Raises:
        ConfigError: The recipe has adapters in another mode, or a base that specialists share.
    """
    tuned = {f"specialists.{name}.tune": source.tune for name, source in recipe.specialists.items()}
    stages = {"stage1": recipe.stage1, "stage2": recipe.stage2, **tuned}
    adapted = [f"{place}.lora" for place, stage in stages.items() if stage is not None and stage.lora is not None]
    if recipe.shared_base:
        raise ConfigError(
            f"shared_base: true is for one process, and there are {num_processes}: start it without torchrun, or "
            "set it to false"
        )
    if adapted and recipe.train.parallel.mode == "specialist":
        raise ConfigError(f"{adapted[0]} does not go with train.parallel.mode: specialist: set mode: fsdp")


def _is_adapter_already(source: SpecialistConfig) -> bool:
    return source.adapter is not None or resolve_adapter(source).model != source.model
