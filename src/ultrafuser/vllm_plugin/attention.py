"""Attention of one specialist: its layers, and builders of metadata of its own for its share of a step.

Builders may keep buffers or plans between steps, so no two specialists share one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.utils import AttentionGroup

from ultrafuser.errors import ConfigError
from ultrafuser.vllm_plugin.own_prompts import Share
from ultrafuser.vllm_plugin.weights import SPECIALISTS


def layers_of(name: str, layer_names: Iterable[str]) -> list[str]:
    """The attention layers of a specialist."""
    part = f"{SPECIALISTS}.{name}."
    return [layer for layer in layer_names if layer.startswith(part) or f".{part}" in layer]


def own_groups(name: str, groups: Sequence[Sequence[AttentionGroup]], vllm_config: Any, device: Any) -> list[list[Any]]:
    """The engine's attention groups of a specialist's layers, with new builders.

    Raises:
        ConfigError: A layer keeps its keys otherwise than all, in order: blocks that leave a window are given to others
            by the engine's count, which is not the specialist's.
    """
    found: list[list[AttentionGroup]] = []
    for same_blocks in groups:
        own = []
        for group in same_blocks:
            if not (layers := layers_of(name, group.layer_names)):
                continue
            spec = group.kv_cache_spec
            if not isinstance(spec, FullAttentionSpec) or spec.sliding_window is not None:
                raise ConfigError(
                    f"specialist {name!r} has layers of {type(spec).__name__} in vLLM, which cannot read its own "
                    "prompt: serve the model with one template, or with `ultrafuser serve`"
                )
            block_size = group.metadata_builders[0].kv_cache_spec.block_size
            mine = replace(group, layer_names=layers, metadata_builders=[], kernel_block_size=None)
            with set_current_vllm_config(vllm_config):
                mine.create_metadata_builders(vllm_config, device, kernel_block_size=block_size)
            own.append(mine)
        found.append(own)
    return found


@dataclass(frozen=True)
class Blocks:
    """The engine's cache in a step.

    Attributes:
        tables: One per group of layers, [R, K].
        sizes: Tokens of a block of each group.
        lengths: Of all sequences after the step, as the engine counts, [R], on the device.
        lengths_cpu: The same or more, on the CPU.
    """

    tables: Sequence[Tensor]
    sizes: Sequence[int]
    lengths: Tensor
    lengths_cpu: Tensor


def own_attention(
    share: Share, groups: list[list[Any]], blocks: Blocks, kv_cache_config: KVCacheConfig
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata, and slots of new keys, of each layer of a specialist; empty where it reads nothing.

    Args:
        share: Of the step.
        groups: From `own_groups`.
        blocks: The engine's.
        kv_cache_config: The engine's; its groups are those of `blocks`.
    """
    if not share.num_tokens:
        return {}, {}
    device = blocks.lengths.device
    requests, behind = torch.from_numpy(share.requests), torch.from_numpy(share.behind)
    lengths_cpu = (blocks.lengths_cpu[requests] - behind).to(blocks.lengths_cpu.dtype)
    lengths = (blocks.lengths[requests.to(device)] - behind.to(device)).to(blocks.lengths.dtype)
    starts = torch.from_numpy(share.starts).to(torch.int32)
    slots = [share.slots(table, size) for table, size in zip(blocks.tables, blocks.sizes, strict=True)]
    metadata = build_attn_metadata(
        attn_groups=groups,
        num_reqs=len(requests),
        num_tokens=share.num_tokens,
        query_start_loc_gpu=starts.to(device),
        query_start_loc_cpu=starts,
        max_query_len=share.longest_query,
        seq_lens=lengths,
        max_seq_len=int(lengths_cpu.max()),
        block_tables=[table[requests.to(device)] for table in blocks.tables],
        slot_mappings=slots,  # indexed by the group, no more
        kv_cache_config=kv_cache_config,
        seq_lens_cpu_upper_bound=lengths_cpu,
        positions=share.positions,
    )
    by_layer = {
        layer: slots[number]
        for number, same_blocks in enumerate(groups)
        for g in same_blocks
        for layer in g.layer_names
    }
    return metadata, by_layer
