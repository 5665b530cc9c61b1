"""Load whatever a user names as a fused model: a fusion, or an ordinary model as a fusion of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from ultrafuser.errors import ConfigError, ModelError
from ultrafuser.model.configuration import FusedConfig
from ultrafuser.model.device import choose_device
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.specialist import load_tokenizer, parse_source


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How models are loaded.

    Attributes:
        template: Of ordinary models; fused ones bring theirs.
        dtype: Of the weights, as torch names it; empty keeps what the folder says.
        device: Where they run; empty takes an accelerator where there is one.
    """

    template: str = "tokenizer"
    dtype: str = ""
    device: str = ""


def load_model(place: str, options: LoadOptions = LoadOptions()) -> tuple[FusedForCausalLM, Any]:
    """A fused model and its tokenizer.

    Args:
        place: Folder, hub id, or GGUF file.
        options: How.

    Raises:
        ConfigError: An unknown dtype or device.
        ModelError: There is no model at the place, or it cannot be loaded.
    """
    dtype = getattr(torch, options.dtype, None) if options.dtype else None
    if options.dtype and not isinstance(dtype, torch.dtype):
        raise ConfigError(f"no dtype is called {options.dtype!r}; usual ones are float32 and bfloat16")
    device = choose_device(options.device, "--device")
    if place.endswith(".gguf"):
        kind = ""
    else:
        try:
            kind = AutoConfig.from_pretrained(place, trust_remote_code=False).model_type
        except (OSError, ValueError) as error:
            raise ModelError(f"no model can be loaded from {place!r}: {' '.join(str(error).split())[:200]}") from error
    if kind == FusedConfig.model_type:
        model = FusedForCausalLM.from_pretrained(place, **({"dtype": dtype} if dtype is not None else {}))
        tokenizer = AutoTokenizer.from_pretrained(place)
    else:
        source = parse_source(place)
        model = FusedForCausalLM.from_specialists({"model": source}, templates=options.template, dtype=dtype)
        tokenizer = load_tokenizer(source)
    return model.to(device).train(False), tokenizer
