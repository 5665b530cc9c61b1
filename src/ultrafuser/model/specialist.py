"""Load one specialist: a model at hand, a folder, a hub id, a GGUF file, or a base with a PEFT adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ultrafuser.config.recipe import SpecialistConfig
from ultrafuser.errors import ModelError
from ultrafuser.model.outline import resolve_adapter


def parse_source(source: str | Path) -> SpecialistConfig:
    """Read the short form: a folder, `owner/name`, `owner/name@revision`, or `folder/model.gguf`."""
    text = str(source)
    if text.endswith(".gguf"):
        return SpecialistConfig(model=str(Path(text).parent), gguf_file=Path(text).name)
    if not Path(text).exists() and text.count("@") == 1:
        model, revision = text.split("@")
        return SpecialistConfig(model=model, revision=revision)
    return SpecialistConfig(model=text)


def load_specialist(source: SpecialistConfig, *, name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load the weights of one specialist; safetensors or GGUF only, nothing is unpickled.

    Raises:
        ModelError: Nothing there, no causal LM, or a missing extra; says which specialist and what to do.
    """
    folder = Path(source.model)
    if (folder / "adapter_config.json").is_file():
        return _load_adapter(source, str(folder), name=name, dtype=dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.model,
            dtype=dtype or torch.float32,
            use_safetensors=None if source.gguf_file else True,
            **_location(source),
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(_explain(source, name, error)) from error
    if source.gguf_file:
        _forget_quantization(model)
    if source.adapter is not None:
        return _merge_adapter(model, source.adapter, name=name)
    return model


def load_tokenizer(source: SpecialistConfig, *, name: str = "tokenizer") -> Any:
    """Load the tokenizer beside a specialist's weights.

    Raises:
        ModelError: There is none.
    """
    try:
        return AutoTokenizer.from_pretrained(source.model, **_location(source))
    except (OSError, ValueError, ImportError) as error:
        base = resolve_adapter(source)
        if base.model != source.model:  # the folder of an adapter need not hold a tokenizer
            return load_tokenizer(base, name=name)
        raise ModelError(_explain(source, name, error, what="tokenizer")) from error


def state_digest(model: torch.nn.Module) -> str:
    """Content hash of a model's weights, whatever files they came from: SHA-256 over names, types, shapes, bytes."""
    return tensors_digest(model.state_dict())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The same of named tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _location(source: SpecialistConfig) -> dict[str, Any]:
    location: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    if source.revision is not None:
        location["revision"] = source.revision
    if source.gguf_file is not None:
        location["gguf_file"] = source.gguf_file
    return location


def _load_adapter(source: SpecialistConfig, adapter: str, *, name: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """The folder holds an adapter: its own configuration names the base."""
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ModelError(f"specialist {name!r} is a PEFT adapter: pip install 'ultrafuser[peft]'") from error
    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not base:
        raise ModelError(f"specialist {name!r}: the adapter in {adapter} names no base model; give model and adapter")
    whole = source.model_copy(update={"model": base, "adapter": adapter})
    return load_specialist(whole, name=name, dtype=dtype)


def _merge_adapter(model: PreTrainedModel, adapter: str, *, name: str) -> PreTrainedModel:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(f"specialist {name!r} has an adapter: pip install 'ultrafuser[peft]'") from error
    try:
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()  # type: ignore[no-any-return]
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"specialist {name!r}: the adapter {adapter} does not fit: {first_line(error)}") from error


def _forget_quantization(model: PreTrainedModel) -> None:
    """A GGUF file is dequantized at load, but the traces of its quantization would break `save_pretrained`."""
    for holder, attribute in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
    ):
        if attribute in vars(holder):
            delattr(holder, attribute)


def _explain(source: SpecialistConfig, name: str, error: Exception, what: str = "model") -> str:
    place = source.model + (f" ({source.gguf_file})" if source.gguf_file else "")
    if "/" not in source.model or Path(source.model).exists() or source.model.startswith((".", "/")):
        hint = "give a folder with config.json and safetensors weights, or a hub id"
    else:
        hint = "check the spelling and that the hub can be reached, or give a local folder"
    return f"specialist {name!r}: no {what} could be loaded from {place}: {first_line(error)}; {hint}"


def first_line(error: Exception) -> str:
    """What an error says, cut to one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
