"""n specialists that are adapters of one base: the base's weights are in memory once.

Each specialist is an ordinary model of transformers with modules of its own, but every parameter and buffer that is no
adapter is the same object in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ultrafuser.config.recipe import SpecialistConfig
from ultrafuser.errors import ConfigError, ModelError
from ultrafuser.model.lora import CONFIG_FILE, Adapter, add_adapter, read_adapter, read_adapter_config, share_weights
from ultrafuser.model.outline import outline
from ultrafuser.model.specialist import load_specialist
from ultrafuser.model.vocabulary import trim_vocabulary


@dataclass(frozen=True, slots=True)
class SharedSources:
    """Where a base and its adapters are.

    Attributes:
        base: The model that all specialists are adapters of.
        adapters: Folder or hub id of each specialist's adapter, in order; None: the base as it is.
    """

    base: SpecialistConfig
    adapters: dict[str, str | None]


def find_base(sources: Mapping[str, SpecialistConfig]) -> SharedSources:
    """The one base of specialists that are adapters, from their configurations; no weights are read.

    Raises:
        ModelError: They are adapters of different bases, or one of them names none.
    """
    bases: dict[str, SpecialistConfig] = {}
    adapters: dict[str, str | None] = {}
    for name, source in sources.items():
        base, adapter = source, source.adapter
        if adapter is None and (Path(source.model) / CONFIG_FILE).is_file():
            adapter = source.model
            named = read_adapter_config(adapter, name=name)
            if not named.base_model_name_or_path:
                raise ModelError(f"specialist {name!r}: the adapter in {adapter} names no base: give model and adapter")
            base = source.model_copy(
                update={"model": named.base_model_name_or_path, "revision": named.revision or source.revision}
            )
        elif adapter is not None:
            own = read_adapter_config(adapter, name=name).base_model_name_or_path
            if own and Path(own).name != Path(source.model).name:
                raise ModelError(
                    f"specialist {name!r}: {adapter} is an adapter of {own} and not of {source.model}: give its own "
                    f"base, or write the right one into its {CONFIG_FILE}"
                )
        bases[name] = base.model_copy(update={"adapter": None, "tune": None, "template": "tokenizer"})
        adapters[name] = adapter
    first = next(iter(bases))
    for name, base in bases.items():
        if _place(base) != _place(bases[first]):
            raise ModelError(
                f"specialists {first!r} and {name!r} have different bases, {bases[first].model} and {base.model}: "
                "shared_base needs adapters of one model. Set shared_base: false to load each whole"
            )
    return SharedSources(bases[first], adapters)


def load_shared(
    sources: SharedSources,
    *,
    dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype | None = None,
    rows: int | None = None,
) -> tuple[PreTrainedModel, dict[str, PreTrainedModel]]:
    """Load a base, once, and its adapters; whether they fit is known before any weight of the base is read.

    Args:
        sources: Where they are.
        dtype: Of the base; None: fp32.
        adapter_dtype: Of the adapters; None: as they were saved.
        rows: Cut the base to this many rows of the vocabulary.

    Raises:
        ModelError: Something is not there, or an adapter does not fit the base.
    """
    adapters = {name: read_adapter(at, name=name) if at else None for name, at in sources.adapters.items()}
    check_adapters(sources.base, adapters)
    base = load_specialist(sources.base, name="base", dtype=dtype)
    trim_vocabulary({"base": base}, size=rows)
    return base, share_base(base, adapters, dtype=adapter_dtype)


def check_adapters(base: SpecialistConfig, adapters: Mapping[str, Adapter | None]) -> None:
    """Refuse adapters that do not fit a base, from its configuration alone.

    Raises:
        ModelError: No base there, or an adapter that does not fit; says whose and where.
    """
    with torch.device("meta"):
        share_base(outline(base, name="base"), adapters)


def check_shared(specialists: Mapping[str, PreTrainedModel]) -> None:
    """Refuse models at hand that do not share their weights.

    Raises:
        ConfigError: A weight that is no adapter is held twice.
    """
    first, *others = specialists
    held = {id(tensor) for key, tensor in specialists[first].named_parameters() if ".lora_" not in key}
    for name in others:
        for key, tensor in specialists[name].named_parameters():
            if ".lora_" not in key and id(tensor) not in held:
                raise ConfigError(
                    f"shared_base: specialist {name!r} has a {key} of its own: make the specialists with share_base"
                )


def share_base(
    base: PreTrainedModel,
    adapters: Mapping[str, Adapter | str | Path | None],
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, PreTrainedModel]:
    """Specialists of one base, by name, in order.

    Args:
        base: Without adapters; frozen here. Its weights are those of the result, no copy is made.
        adapters: A peft folder or hub id, or an adapter at hand; None: the base as it is.
        dtype: Of the adapters' weights; None: as they were saved.

    Raises:
        ModelError: An adapter cannot be read, does not fit the base, or changes more than linear layers below the head.
    """
    read = {
        name: read_adapter(adapter, name=name) if isinstance(adapter, (str, Path)) else adapter
        for name, adapter in adapters.items()
    }
    base.requires_grad_(False)
    specialists = {}
    for name, adapter in read.items():
        twin = share_weights(base)
        specialists[name] = add_adapter(twin, adapter, name=name, dtype=dtype) if adapter is not None else twin
    return specialists


def _place(source: SpecialistConfig) -> tuple[str, str | None, str | None]:
    place = str(Path(source.model).resolve()) if Path(source.model).exists() else source.model
    return place, source.revision, source.gguf_file
