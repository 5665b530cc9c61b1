"""Own prompts on vLLM's second model runner: the state that it lets a model keep of its requests. Experimental.

The runner calls it when requests come and go, and before every step for the metadata of attention and for what
`forward` gets. A step in which nobody brings prompts is left as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState

from ultrafuser.errors import RequestError
from ultrafuser.vllm_plugin.attention import Blocks, own_attention, own_groups
from ultrafuser.vllm_plugin.own_prompts import OwnStep, PromptTable, Step, share_step
from ultrafuser.vllm_plugin.requests import check_length, read_prompts

logger = init_logger("vllm.ultrafuser")


class OwnPromptsState(DefaultModelState):  # type: ignore[misc]
    """The prompts of the requests that the runner holds, and what each specialist reads of a step."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.names: list[str] = model.names
        self.table = PromptTable(self.max_num_reqs, len(self.names), device)
        self.rows: dict[str, int] = {}  # by request, of those that bring prompts
        self.block_sizes: list[int] = []
        self.groups: dict[str, list[list[Any]]] = {}
        self.planned: tuple[InputBatch, OwnStep] | None = None

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Keep the prompts that a request brings; after a preemption it comes again, and brings them again."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        prompts = read_prompts(
            params.extra_args if params is not None else None,
            num_specialists=len(self.names),
            vocab_size=self.model_config.get_vocab_size(),
        )
        try:
            if prompts is not None:
                check_length(prompts, len(new_req_data.prompt_token_ids or ()))
        except RequestError as error:  # the processor of logits ends this request, and only this one
            logger.error("request %s: %s", new_req_data.req_id, error)
            prompts = None
        self.table.put(req_index, prompts)
        if prompts is not None:
            self.rows[new_req_data.req_id] = req_index

    def remove_request(self, req_id: str) -> None:
        """Forget a request's prompts."""
        super().remove_request(req_id)
        if (row := self.rows.pop(req_id, None)) is not None:
            self.table.put(row, None)

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: BlockTables) -> None:
        """Note the sizes of blocks; builders come with the first step that needs them."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.block_sizes = list(block_tables.block_sizes)
        self.groups = {}

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[Any]],
        kv_cache_config: Any,
        **options: Any,
    ) -> dict[str, Any]:
        """Metadata of every layer: of a specialist's own sequences where somebody brings prompts."""
        self.planned = None
        # A batch made up for a warm-up has names of its own, so nobody's prompts are read in it.
        rows = np.array([self.rows.get(request, self.table.nobody) for request in input_batch.req_ids], dtype=np.int64)
        if not self.table.has_own(rows):
            found: dict[str, Any] = super().prepare_attn(
                input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, **options
            )
            return found
        assert cudagraph_mode == CUDAGraphMode.NONE, "settings.py switches graphs off"
        count = input_batch.num_reqs
        step = Step(
            table_rows=rows,
            scheduled=input_batch.num_scheduled_tokens[:count].astype(np.int64),
            computed=input_batch.num_computed_tokens_np[:count].astype(np.int64),
            input_ids=input_batch.input_ids,
            positions=input_batch.positions,
        )
        shares = share_step(self.table, step)
        blocks = Blocks(
            tables=[table[:count] for table in block_tables],
            sizes=self.block_sizes,
            lengths=input_batch.seq_lens[:count],
            lengths_cpu=input_batch.seq_lens_cpu_upper_bound[:count],
        )
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        for name, share in zip(self.names, shares, strict=True):
            if name not in self.groups:
                self.groups[name] = own_groups(name, attn_groups, self.vllm_config, self.device)
            of_layers, slots_of_layers = own_attention(share, self.groups[name], blocks, kv_cache_config)
            metadata |= of_layers
            slots |= slots_of_layers
        self.planned = (input_batch, OwnStep(shares, slots))
        return metadata

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """What `forward` gets besides the engine's ids and positions."""
        inputs = dict(super().prepare_inputs(input_batch, req_states))
        planned, self.planned = self.planned, None
        if planned is not None and planned[0] is input_batch:
            inputs["own"] = planned[1]
        return inputs
