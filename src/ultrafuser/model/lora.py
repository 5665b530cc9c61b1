"""Low-rank adapters (LoRA) of frozen weights, by peft: read, put into a model, written as a peft folder.

An adapted layer computes `base_layer(x) + scaling * B A x`. The layers are peft's own, the adapter's name is "default",
and every other parameter of the model stays where it was.

Source: Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ultrafuser.errors import ModelError
from ultrafuser.model.specialist import first_line

ADAPTER_NAME = "default"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of a peft file's keys
_PARTS = ("lora_A", "lora_B")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that is in no model yet.

    Attributes:
        config: peft's `LoraConfig`.
        state: `<module>.lora_A` and `<module>.lora_B` by name; None: new weights, with which the model computes what it
            computed before.
    """

    config: Any
    state: Mapping[str, Tensor] | None = None


def read_adapter(place: str | Path, *, name: str) -> Adapter:
    """Read a peft folder or hub id; safetensors only.

    Args:
        place: Where it is.
        name: Of the specialist, for messages.

    Raises:
        ModelError: Nothing there, or an adapter of another kind than plain LoRA of linear layers.
    """
    config = read_adapter_config(place, name=name)
    try:
        state = load_file(_find(place, WEIGHTS_FILE))
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"specialist {name!r}: no adapter weights could be read from {place}: {first_line(error)}; give a folder "
            f"with {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from error
    return Adapter(config, {_plain_key(key, place): value for key, value in state.items()})


def read_adapter_config(place: str | Path, *, name: str) -> Any:
    """peft's configuration of an adapter, its weights untouched.

    Raises:
        ModelError: Nothing there, or an adapter of another kind than plain LoRA of linear layers.
    """
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ModelError(f"specialist {name!r} is a PEFT adapter: pip install 'ultrafuser[peft]'") from error
    try:
        config = PeftConfig.from_pretrained(str(place))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"specialist {name!r}: no adapter in {place}: {first_line(error)}") from error
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ModelError(f"specialist {name!r}: the adapter in {place} is a {config.peft_type}; use a LoRA adapter")
    told = (
        "use_dora",
        "modules_to_save",
        "target_parameters",
        "trainable_token_indices",
        "lora_bias",
        "layer_replication",
    )
    used = [field for field in told if getattr(config, field, None)]
    if config.bias != "none":
        used.append("bias")
    if used:
        raise ModelError(
            f"specialist {name!r}: the adapter in {place} uses {', '.join(used)}, which is more than low-rank "
            "updates of linear layers: merge it into its base first, and give the merged model"
        )
    return config


def add_adapter(
    model: PreTrainedModel, adapter: Adapter, *, name: str, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Put an adapter into a model, in place; the model's own parameters stay the same objects.

    Args:
        model: Without adapters so far.
        adapter: What to put in.
        name: Of the specialist, for messages.
        dtype: Of the adapter's weights; None: that of `adapter.state`, and fp32 for new ones.

    Raises:
        ModelError: It targets the head, embeddings or layers that are not there, or its weights do not fit them.
    """
    from peft import inject_adapter_in_model

    head = model.get_output_embeddings()
    config = copy.deepcopy(adapter.config)
    if adapter.state is not None:
        config.init_lora_weights = True  # some ways to draw new weights change the base's own
    try:
        inject_adapter_in_model(config, model, ADAPTER_NAME)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"specialist {name!r}: the adapter does not fit its base: {first_line(error)}") from error
    for place, layer in lora_layers(model):
        if layer.get_base_layer() is head:
            raise ModelError(
                f"specialist {name!r}: the adapter changes the head {place!r}, whose weights the loss reads as they "
                "are: leave it out of the targets"
            )
        if not hasattr(layer, "lora_A") or not isinstance(_module(layer, "lora_A"), nn.Linear):
            raise ModelError(f"specialist {name!r}: the adapter changes {place!r}, which is no linear layer")
    _fill(model, adapter, name=name, dtype=dtype)
    return model


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and layer (`peft.tuners.lora.Linear`) of each adapted layer; nothing where peft is not installed."""
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        return
    yield from ((place, module) for place, module in model.named_modules() if isinstance(module, LoraLayer))


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has an adapter."""
    return next(lora_layers(model), None) is not None


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return any(f".{part}.{ADAPTER_NAME}." in name for part in _PARTS)


def low_rank_update(layer: Any, x: Tensor) -> Tensor:
    """What an adapted layer adds to its base layer's output, in the adapter's own type."""
    lowered = _module(layer, "lora_A")(layer.lora_dropout[ADAPTER_NAME](x.to(_module(layer, "lora_A").weight.dtype)))
    update: Tensor = _module(layer, "lora_B")(lowered) * layer.scaling[ADAPTER_NAME]
    return update


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights of a model's adapter, as `Adapter.state` holds them."""
    return {
        f"{place}.{part}": _module(layer, part).weight.detach()
        for place, layer in lora_layers(model)
        for part in _PARTS
    }


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a model but its adapters', under the names they have without adapters."""
    return {key.replace(".base_layer.", "."): value for key, value in model.state_dict().items() if not is_adapter(key)}


@torch.no_grad()
def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """A plain copy of a model with its adapter added to its weights; the sum is made in fp32."""
    merged = copy.deepcopy(model)
    for _, layer in lora_layers(merged):
        base_layer = layer.get_base_layer()
        weight = base_layer.weight
        update = layer.scaling[ADAPTER_NAME] * (
            _module(layer, "lora_B").weight.float() @ _module(layer, "lora_A").weight.float()
        )
        if layer.fan_in_fan_out:  # GPT-2 keeps its matrices the other way round
            update = update.T
        base_layer.weight = nn.Parameter((weight.float() + update).to(weight.dtype))
    return _unwrap(merged).requires_grad_(True)


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is without its adapter: modules of its own over the very weights."""
    return _unwrap(share_weights(model))


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model with modules of its own over the very parameters and buffers of another."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def write_adapter(model: PreTrainedModel, folder: Path, *, base: str, revision: str | None = None) -> None:
    """Write a model's adapter as a peft folder.

    Args:
        model: With an adapter.
        folder: Made where it is not there.
        base: Folder or hub id of the base model, for `adapter_config.json`.
        revision: Of the base.
    """
    from peft import LoraConfig

    held: Any = model
    values = {**held.peft_config[ADAPTER_NAME].to_dict(), "base_model_name_or_path": base, "revision": revision}
    config = LoraConfig(**{**values, "inference_mode": True})
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    written = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if isinstance(written["target_modules"], list):  # a set in memory: the same adapter makes the same file
        written["target_modules"].sort()
    (folder / CONFIG_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    state = {f"{_PREFIX}{key}.weight": value.cpu().contiguous() for key, value in adapter_state(model).items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _unwrap(model: PreTrainedModel) -> PreTrainedModel:
    for place, layer in list(lora_layers(model)):
        parent, _, leaf = place.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def _fill(model: PreTrainedModel, adapter: Adapter, *, name: str, dtype: torch.dtype | None) -> None:
    given = dict(adapter.state) if adapter.state is not None else None
    for place, layer in lora_layers(model):
        for part in _PARTS:
            linear = _module(layer, part)
            value = linear.weight.detach().to(dtype or torch.float32)
            if given is not None:
                stored = given.pop(f"{place}.{part}", None)
                if stored is None or stored.shape != value.shape:
                    found = "is not in its file" if stored is None else f"is {tuple(stored.shape)} in its file"
                    raise ModelError(
                        f"specialist {name!r}: the adapter's {place}.{part} should be {tuple(value.shape)} for this "
                        f"base, but {found}: it belongs to another base"
                    )
                # A copy: what safetensors reads is backed by the file.
                value = stored.to(device=value.device, dtype=dtype or stored.dtype, copy=True)
            linear.weight = nn.Parameter(value)
    if given:
        raise ModelError(
            f"specialist {name!r}: the adapter changes {next(iter(given))!r}, which its base does not have: it belongs "
            "to another base"
        )


def _module(layer: Any, part: str) -> Any:
    return getattr(layer, part)[ADAPTER_NAME]


def _plain_key(key: str, place: str | Path) -> str:
    stripped = key.removeprefix(_PREFIX).removesuffix(".weight")
    if stripped.rsplit(".", 1)[-1] not in _PARTS:
        raise ModelError(f"the adapter in {place} holds {key!r}, which is no part of a LoRA of a linear layer")
    return stripped


def _find(place: str | Path, file: str) -> str:
    if Path(place).is_dir():
        return str(Path(place) / file)
    from transformers.utils.hub import cached_file

    return str(cached_file(str(place), file))
