"""Where vLLM lets a plugin look at a request before it is accepted, and again when it runs: processors of logits.

They check what a request brings and change nothing of what a model says, but for one case that vLLM shows too late to
refuse: a request whose prompt is not the longest of those that it brings. It ends at once, and the log says why.

vLLM finds a processor by its name, in each of its processes; so the names say what to check against:
`First_3_32000` and `Second_3_32000` are for the two model runners, three specialists and 32,000 ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as FirstProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondProcessor

from ultrafuser.errors import RequestError
from ultrafuser.vllm_plugin.own_prompts import PromptTable
from ultrafuser.vllm_plugin.requests import Prompts, check_length, read_prompts

logger = init_logger("vllm.ultrafuser")


class _Checks:
    num_specialists: ClassVar[int] = 0
    vocab_size: ClassVar[int] = 0

    @classmethod
    def prompts_of(cls, params: SamplingParams) -> Prompts | None:
        return read_prompts(params.extra_args, num_specialists=cls.num_specialists, vocab_size=cls.vocab_size)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request, with status 400 of a server.

        Raises:
            ValueError: What it brings is damaged, or cannot be had together with own prompts.
        """
        try:
            prompts = cls.prompts_of(sampling_params)
        except RequestError as error:
            raise ValueError(str(error)) from error
        if prompts is not None and sampling_params.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs and echo: the specialists' prompts differ, so none of them has a score")


class First(_Checks, FirstProcessor):  # type: ignore[misc]
    """On the first runner, which has no other place for what a request brings, this is also who knows the requests."""

    running: ClassVar[First | None] = None  # one engine a process

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        del is_pin_memory
        self.table = PromptTable(vllm_config.scheduler_config.max_num_seqs, max(self.num_specialists, 1), device)
        self.prompts: dict[int, Prompts] = {}
        self.ends: dict[int, int] = {}  # of requests that cannot run: the token that ends them
        First.running = self

    def is_argmax_invariant(self) -> bool:
        """It may end a request that brings prompts; a server that takes none has none to end."""
        return not self.num_specialists

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they come, move and go; called before each step."""
        if process_dict_updates(self.prompts, batch_update, self._accept):
            for row in range(self.table.nobody):
                self.table.put(row, self.prompts.get(row))
        process_dict_updates(self.ends, batch_update, self._end)

    def apply(self, logits: Tensor) -> Tensor:
        """End the requests that cannot run."""
        return _ended(logits, [(row, end) for row, end in self.ends.items() if row < logits.shape[0]])

    def _accept(self, params: SamplingParams, prompt: list[int] | None, _: list[int]) -> Prompts | None:
        prompts = self.prompts_of(params)
        return prompts if prompts is not None and not _mistake(prompts, len(prompt or ())) else None

    def _end(self, params: SamplingParams, prompt: list[int] | None, _: list[int]) -> int | None:
        prompts = self.prompts_of(params)
        if prompts is None or not (mistake := _mistake(prompts, len(prompt or ()))):
            return None
        logger.error("a request was ended: %s", mistake)
        return min(params.all_stop_token_ids, default=0)


class Second(_Checks, SecondProcessor):  # type: ignore[misc]
    """On the second runner, `model_state.py` knows the requests; this one only ends those that cannot run."""

    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState) -> None:
        super().__init__(vllm_config, req_states)
        self.prompt_lengths = req_states.prompt_len
        self.ends: dict[int, int] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Whether this request is to be ended."""
        self.ends.pop(req_idx, None)
        prompts = self.prompts_of(sampling_params)
        if prompts is None or not _mistake(prompts, int(self.prompt_lengths.np[req_idx])):
            return False
        self.ends[req_idx] = min(sampling_params.all_stop_token_ids, default=0)
        return True

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """End the requests that cannot run."""
        if not any(int(slot) in self.ends for slot in ctx.idx_mapping_np):
            return logits
        slots = ctx.expanded_idx_mapping.tolist()
        return _ended(logits, [(row, self.ends[slot]) for row, slot in enumerate(slots) if slot in self.ends])


@cache
def _made(name: str) -> type:
    kind, num_specialists, vocab_size = name.split("_")
    base = {"First": First, "Second": Second}[kind]
    return type(name, (base,), {"num_specialists": int(num_specialists), "vocab_size": int(vocab_size)})


def __getattr__(name: str) -> type:
    if name.count("_") != 2 or name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _made(name)


def _mistake(prompts: Prompts, prompt_length: int) -> str:
    try:
        check_length(prompts, prompt_length)
    except RequestError as error:
        return str(error)
    return ""


def _ended(logits: Tensor, ends: Sequence[tuple[int, int]]) -> Tensor:
    for row, end in ends:
        logits[row] = -torch.inf
        logits[row, end] = 0.0
    return logits
