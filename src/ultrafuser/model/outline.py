"""A specialist's architecture from its configuration alone: shapes of every parameter, and no weights."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ultrafuser.config.recipe import SpecialistConfig
from ultrafuser.errors import ModelError
from ultrafuser.model.hub import cached_folder, hub_is_reachable, is_local

# Reading a stranger's files, transformers raises whatever Python does.
READ_ERRORS = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, RuntimeError)


def read_config(source: SpecialistConfig, *, name: str) -> Any:
    """The configuration of a specialist; that of its base, where it is an adapter.

    Raises:
        ModelError: No such folder, no config.json, or a hub that cannot be reached; one line that says what to do.
    """
    source = resolve_adapter(source)
    where: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    if source.gguf_file is not None:
        where["gguf_file"] = source.gguf_file
    target = source.model
    if is_local(source.model):
        if not Path(source.model).is_dir():
            raise ModelError(
                f"specialist {name!r}: there is no folder {source.model}; give one that holds its config.json at least"
            )
        where["local_files_only"] = True
    elif (cached := cached_folder(source.model, source.revision)) is not None:
        target, where["local_files_only"] = str(cached), True
    elif hub_is_reachable():
        where["revision"] = source.revision or "main"
    else:
        raise ModelError(
            f"specialist {name!r}: the hub cannot be reached for {source.model}; name a folder that holds its "
            f"config.json, as in --set specialists.{name}.model=FOLDER"
        )
    try:
        return AutoConfig.from_pretrained(target, **where)
    except READ_ERRORS as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"specialist {name!r}: no configuration could be read from {target}: {reason}") from error


def outline(source: SpecialistConfig, *, name: str) -> Any:
    """The whole architecture of a specialist on the meta device.

    Raises:
        ModelError: It has no configuration, or none of a causal LM.
    """
    config = read_config(source, name=name)
    try:
        return without_weights(config, source.trust_remote_code)
    except READ_ERRORS as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"specialist {name!r}: {source.model} describes no causal LM: {reason}") from error


def without_weights(config: Any, trust_remote_code: bool = False) -> Any:
    """The architecture on the meta device: parameters have shapes, but no memory."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build: Any = AutoModelForCausalLM.from_config
        return build(copy.deepcopy(config), trust_remote_code=trust_remote_code)


def resolve_adapter(source: SpecialistConfig) -> SpecialistConfig:
    """A folder that holds an adapter stands for its base with the adapter, as when it is loaded."""
    file = Path(source.model) / "adapter_config.json"
    if source.adapter is not None or not file.is_file():
        return source
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        return source
    return source.model_copy(update={"model": base, "adapter": source.model}) if isinstance(base, str) else source
