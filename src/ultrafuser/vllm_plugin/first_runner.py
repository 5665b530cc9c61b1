"""Own prompts on vLLM's first model runner, on a CPU: from what it shows a model while a step runs. Experimental.

That runner has no place for a model's own state. But its processors of logits know the requests (`processors.py`),
and the context of a forward holds the metadata of its attention; from both the same step can be made.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.worker.utils import AttentionGroup

from ultrafuser.vllm_plugin.attention import Blocks, layers_of, own_attention, own_groups
from ultrafuser.vllm_plugin.own_prompts import OwnStep, Step, share_step
from ultrafuser.vllm_plugin.processors import First


class FirstRunner:
    """Steps as each specialist reads them.

    Args:
        names: Of the specialists that run.
        vllm_config: The engine's.
    """

    def __init__(self, names: Sequence[str], vllm_config: Any) -> None:
        self.names, self.vllm_config = list(names), vllm_config
        self.groups: dict[str, list[list[Any]]] = {}

    def step(self, input_ids: Tensor, positions: Tensor) -> OwnStep | None:
        """What each specialist reads of the step that runs; None where nobody brings prompts.

        The metadata of its attention take the place of the engine's in the context.
        """
        context = get_forward_context()
        if First.running is None or not context.attn_metadata:  # a run to warm up has none
            return None
        engines: Any = context.attn_metadata
        one = next(iter(engines.values()))
        starts, lengths = one.query_start_loc.cpu().numpy().astype(np.int64), one.seq_lens
        rows = np.arange(len(starts) - 1)
        if not First.running.table.has_own(rows):
            return None
        scheduled = np.diff(starts)
        computed = lengths.cpu().numpy().astype(np.int64) - scheduled
        shares = share_step(First.running.table, Step(rows, scheduled, computed, input_ids, positions))
        slots: dict[str, Tensor] = {}
        for name, share in zip(self.names, shares, strict=True):
            if name not in self.groups:
                found = own_groups(name, self._all_groups(), self.vllm_config, "cpu")
                self.groups[name] = [group for group in found if group]
            groups = self.groups[name]
            of_each = [group[0] for group in groups]
            blocks = Blocks(
                tables=[engines[group.layer_names[0]].block_table for group in of_each],
                sizes=[group.metadata_builders[0].kv_cache_spec.block_size for group in of_each],
                lengths=lengths,
                lengths_cpu=lengths.cpu(),
            )
            counted: Any = SimpleNamespace(kv_cache_groups=groups)
            metadata, slots_of_layers = own_attention(share, groups, blocks, counted)
            engines.update(metadata)
            slots |= slots_of_layers
        return OwnStep(shares, slots)

    def _all_groups(self) -> list[list[AttentionGroup]]:
        """Layers that one builder can serve, each kind in a group of its own."""
        kinds: dict[Any, AttentionGroup] = {}
        sizes: dict[Any, int] = {}
        layers: dict[str, Any] = get_layers_from_vllm_config(self.vllm_config, Attention)
        for name, layer in layers.items():
            specialist = next(s for s in self.names if layers_of(s, [name]))
            spec, backend = layer.get_kv_cache_spec(self.vllm_config), layer.get_attn_backend()
            kind = (specialist, backend, spec, layer.num_heads)
            if kind not in kinds:
                kinds[kind] = AttentionGroup(backend, [], spec, 0)
                sizes[kind] = layer.kv_cache.shape[2]  # blocks, heads, tokens of a block, 2 * size of a head
            kinds[kind].layer_names.append(name)
        for kind, group in kinds.items():
            group.create_metadata_builders(self.vllm_config, "cpu", kernel_block_size=sizes[kind])
        return [[group] for group in kinds.values()]
