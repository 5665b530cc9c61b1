"""How many choices fit: slots of a context's length, within the memory for caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ultrafuser.engine import few_rows
from ultrafuser.engine.llama import is_llama_like
from ultrafuser.engine.narrow import keeps_values
from ultrafuser.engine.options import EngineOptions
from ultrafuser.engine.weights import cache_type, can_pack
from ultrafuser.errors import ModelError
from ultrafuser.model.fused import FusedForCausalLM

LONGEST_BY_DEFAULT = 4096
_SHARE = 0.5  # of free memory, for caches
_SHARE_OF_COPIES = 0.25  # of the machine's memory, for weights in a second layout


def fit_slots(
    model: FusedForCausalLM, options: EngineOptions, *, draft: PreTrainedModel | None = None
) -> tuple[int, int]:
    """Context and slots.

    Args:
        model: The fused model.
        options: What was asked for.
        draft: A drafting model.

    Returns:
        Tokens of the longest view, and how many choices may run at once.

    Raises:
        ModelError: Not even one choice fits, or the context is longer than the specialists were made for.
    """
    models = [*model.specialists.values(), *([draft] if draft is not None else [])]
    limits = [limit for part in models if (limit := _position_limit(part))]
    longest = min(limits, default=0)
    if options.max_context and longest and options.max_context > longest:
        raise ModelError(f"the context is {options.max_context} tokens; these specialists were made for {longest}")
    context = options.max_context or min(longest or LONGEST_BY_DEFAULT, LONGEST_BY_DEFAULT)
    packs = may_pack(model, options)
    per_slot = context * sum(_bytes_per_token(part, _cache_type(part, options, packs)) for part in models)
    free = free_bytes(models[0].device) - sum(
        _bytes_of_copies(part, own, options, packs) for part, own in zip(models, _distinct(models), strict=True)
    )
    budget = options.cache_bytes or int(_SHARE * max(free, 0))
    slots = min(options.max_choices, budget // max(per_slot, 1))
    if slots < 1:
        raise ModelError(
            f"one choice of {context} tokens takes {per_slot / 2**20:.0f} MiB of cache and {budget / 2**20:.0f} MiB "
            "are there: allow a smaller context, or more memory"
        )
    return context, slots


def may_pack(model: FusedForCausalLM, options: EngineOptions, *, sharers: int = 1) -> bool:
    """Whether weights are held a second time: as asked for, or where that is a small part of the machine's memory.

    All of its memory counts and not what is free, so that answers do not depend on what else it did at start.

    Args:
        model: The fused model.
        options: What was asked for.
        sharers: Processes that do the same on this machine.
    """
    if options.pack is not None:
        return options.pack
    # Of 16 bits, which make copies of half the size, as of fp32: the rule is one for all.
    size = 4 * sum(_distinct(list(model.specialists.values())))
    return sharers * size <= _SHARE_OF_COPIES * _machine_bytes("MemTotal")


def is_out_of_memory(error: Exception) -> bool:
    """Whether less work would do; the CPU's allocator raises a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses, on a device or in the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _machine_bytes("MemAvailable")


def _machine_bytes(name: str) -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123  a file of the kernel
            lines = dict(line.split(":") for line in file)
        return int(lines[name].split()[0]) * 1024
    except (OSError, KeyError):
        return 8 * 2**30  # elsewhere than on Linux: a small machine's


def _bytes_of_copies(model: PreTrainedModel, num_weights: int, options: EngineOptions, packs: bool) -> int:
    """Memory that the engine's formats of so many of a model's weights will take, roughly, less what it gives back."""
    first = next(model.parameters())
    if not is_llama_like(model) or first.device.type != "cpu":
        return 0
    copies_16_bit = keeps_values(first) and not few_rows.has_kernel()
    packed = 4.0 if can_pack(first) else 2.0 if copies_16_bit else 0.0
    own = {"exact": packed if packs else 0.0, "half": 2.0, "int8": 1.0}[options.weights]
    if options.release_model and (options.weights != "exact" or copies_16_bit):
        own = max(own - first.element_size(), 0.0)
    of_auto = 1.0 if few_rows.has_kernel() else 0.625
    if first.dtype != torch.float32 and not packs:
        of_auto = 0.0
    drafts = {"auto": of_auto, "int4": 0.625, "int8": 1.0, "half": 2.0, "exact": 0.0}[options.draft_weights]
    return int((own + (drafts if "self" in options.drafts else 0.0)) * num_weights)


def _distinct(models: Sequence[PreTrainedModel]) -> list[int]:
    """Weights of each model that none before it has: those of a shared base count once."""
    known: set[int] = set()
    counts = []
    for model in models:
        new = {id(p): p.numel() for p in model.parameters() if id(p) not in known}
        known.update(new)
        counts.append(sum(new.values()))
    return counts


def _position_limit(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 0) or 0)


def _cache_type(model: PreTrainedModel, options: EngineOptions, packs: bool) -> torch.dtype:
    """Of keys and values: the leaner forward may keep them in another type than the model's."""
    return cache_type(next(model.parameters()), options.weights, pack=packs) if is_llama_like(model) else model.dtype


def _bytes_per_token(model: PreTrainedModel, dtype: torch.dtype | None = None) -> int:
    config = model.config.get_text_config()
    num_heads = getattr(config, "num_attention_heads", None)
    if not num_heads:  # without attention there is nothing to count, and the runner will refuse it by name
        return 0
    heads = getattr(config, "num_key_value_heads", None) or num_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return int(2 * config.num_hidden_layers * heads * size * (dtype or model.dtype).itemsize)
