"""n specialists that are adapters of one base: the base's weights are in memory once.

Each specialist is an ordinary model of transformers with modules of its own, but every parameter and buffer that is no
adapter is the same object in all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ultrafuser.model.lora import Adapter, add_adapter, read_adapter


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


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model with modules of its own over the very parameters and buffers of another."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)
