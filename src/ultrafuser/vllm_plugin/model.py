"""The fused model as vLLM runs it: n backbones of vLLM's own, one gate, one concatenated head.

`sum_j w_j W_j h_j = [W_1|...|W_n] concat(w_j h_j)`: a fused model is an ordinary causal LM whose last hidden state is
the concatenation of the weighted ones. Everything after the backbones (sampling, log-probabilities, verification of
drafts, tensor parallelism of the head) is therefore vLLM's own.

Shapes: T tokens of all requests of a step, N specialists, H hidden size of each, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import PPMissingLayer, init_vllm_registered_model, maybe_prefix

from ultrafuser.errors import ModelError
from ultrafuser.model.configuration import FusedConfig
from ultrafuser.model.fusion import gate_weights, uniform_scores
from ultrafuser.model.gate import Gate
from ultrafuser.vllm_plugin.own_prompts import OwnStep, Share
from ultrafuser.vllm_plugin.settings import wants_own_prompts
from ultrafuser.vllm_plugin.weights import GATE, SPECIALISTS, deal, needs_gate, running_names


class FusedForVllm(nn.Module):
    """Several specialists that write one text, in vLLM."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: FusedConfig = vllm_config.model_config.hf_config
        self.config = config
        self.names = running_names(config)
        self.specialists = nn.ModuleDict()
        for name in self.names:
            part = copy.deepcopy(config.specialist_configs[name])
            # One compiled graph for each: its file is found by the configuration, and specialists of one architecture
            # must not load each other's, where names of layers, which have the caches, may be constants.
            part.fused_as = name
            with set_model_tag(f"ultrafuser_{name}"):
                self.specialists[name] = init_vllm_registered_model(
                    vllm_config,
                    # Named, not numbered: vLLM reads the number of a layer from the only integer in its name.
                    prefix=maybe_prefix(prefix, f"{SPECIALISTS}.{name}"),
                    hf_config=part,
                    architectures=part.architectures,
                )
        sizes = dict(zip(config.names, config.hidden_sizes, strict=True))
        self.fusion_gate: Gate | None = None
        if needs_gate(config):
            with _fp32():
                self.fusion_gate = Gate(sizes, hidden_size=config.gate_hidden_size, num_layers=config.gate_num_layers)
        self.bounds = list(pairwise(accumulate((sizes[name] for name in self.names), initial=0)))
        self.scales = [_logit_scale(self.specialists[name], name) for name in self.names]
        self.lm_head = ParallelLMHead(config.vocab_size, self.bounds[-1][1], prefix=maybe_prefix(prefix, "lm_head"))
        self.logits_processor = LogitsProcessor(config.vocab_size)
        # Of a gate-only checkpoint: what the folder itself does not hold.
        self.secondary_weights = [
            DefaultModelLoader.Source(
                str(source["model"]),
                source["revision"],
                prefix=f"{SPECIALISTS}.{source['name']}.",
                allow_patterns_overrides=["model*.safetensors"],  # nothing is unpickled
            )
            for source in (config.sources if config.gate_only else ())
            if source["name"] in self.names
        ]
        self._is_loaded = False
        self._first_runner: Any = None
        if wants_own_prompts(vllm_config):
            self._read_own_prompts(vllm_config)

    def _read_own_prompts(self, vllm_config: VllmConfig) -> None:
        """Let each specialist read its own prompt, by the means that the model runner has."""
        if vllm_config.use_v2_model_runner:
            from ultrafuser.vllm_plugin.model_state import OwnPromptsState

            self.get_model_state_cls = lambda: OwnPromptsState  # where it is missing, vLLM takes its own
        else:
            from ultrafuser.vllm_plugin.first_runner import FirstRunner

            self._first_runner = FirstRunner(self.names, vllm_config)

    def _part(self, name: str) -> Any:
        return self.specialists[name]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The first specialist's embeddings: vLLM asks, a fused model never reads them."""
        embeddings: Tensor = self._part(self.names[0]).embed_input_ids(input_ids)
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        own: OwnStep | None = None,
        **_: Any,
    ) -> Tensor:
        """Weighted last hidden states side by side, [T, sum of H].

        Args:
            own: What each specialist reads instead of ids and positions, in a step with own prompts.
        """
        del intermediate_tensors
        assert inputs_embeds is None, "settings.py refuses prompt embeddings"
        if self._first_runner is not None:
            own = self._first_runner.step(input_ids, positions)
        if own is not None:
            get_forward_context().slot_mapping.update(own.slots)
        fused: Tensor | None = None
        for j, (name, (start, stop)) in enumerate(zip(self.names, self.bounds, strict=True)):
            if own is None:
                hidden = self.specialists[name](input_ids, positions, None, None)
            else:
                hidden = self._own_hidden(name, own.shares[j], stop - start)
            if fused is None:
                fused = hidden.new_empty((hidden.shape[0], self.bounds[-1][1]))
            # Copied before the next one runs: captured graphs share memory, where it would be overwritten.
            fused[:, start:stop] = hidden
        assert fused is not None
        hiddens = [fused[:, start:stop] for start, stop in self.bounds]
        weights = self._weights(hiddens)
        for j, hidden in enumerate(hiddens):
            hidden.copy_(hidden.float() * (weights[:, j, None] * self.scales[j]))
        return fused

    def _own_hidden(self, name: str, share: Share, size: int) -> Tensor:
        """Last hidden states [T, H] of a specialist that reads a share of the step."""
        if not share.num_tokens:
            nothing: Tensor = self.lm_head.weight.new_zeros((len(share.place), size))
            return nothing
        hidden: Tensor = self.specialists[name](share.input_ids, share.positions, None, None)
        return share.spread(hidden)

    def _weights(self, hiddens: list[Tensor]) -> Tensor:
        """[T, N], fp32: in bf16 near-ties between specialists flip."""
        if self.fusion_gate is None:
            return gate_weights(uniform_scores(hiddens[0], len(hiddens)))
        return gate_weights(self.fusion_gate(hiddens, self.names))

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits of the fused distribution (Equation 1), [T, V]."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def compute_logits_local(self, hidden_states: Tensor) -> Tensor:
        """Logits of this rank's part of the vocabulary."""
        logits: Tensor = self.logits_processor(self.lm_head, hidden_states, skip_gather=True)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Deal the weights of a checkpoint to specialists and gate, then join the heads.

        Raises:
            ModelError: A weight is missing, or weights were loaded before: the heads that would take them are gone.
        """
        if self._is_loaded:
            raise ModelError("the weights of a fused model are loaded once: start the server anew to take others")
        loaded = {"lm_head.weight"}  # joined below
        for owner, part in deal(weights, self.config):
            if owner == GATE:
                loaded |= {f"{GATE}.{name}" for name in self._load_gate(part)}
            else:
                loaded |= {f"{SPECIALISTS}.{owner}.{name}" for name in self._part(owner).load_weights(part)}
        if missing := sorted({name for name, _ in self.named_parameters()} - loaded):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelError(f"the checkpoint lacks the weight {missing[0]!r}{more}: it is incomplete, fetch it again")
        self._join_heads()
        self._is_loaded = True
        return loaded

    def _load_gate(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        own = dict(self.fusion_gate.named_parameters()) if self.fusion_gate is not None else {}
        for name, tensor in weights:
            if name in own:  # another gate's weights than those that run are of specialists left out
                own[name].data.copy_(tensor)
                yield name

    def _join_heads(self) -> None:
        for name, (start, stop) in zip(self.names, self.bounds, strict=True):
            path, head = _find_head(self.specialists[name], name)
            self.lm_head.weight.data[:, start:stop] = head.weight.data
            if isinstance(head, ParallelLMHead):  # never read again
                parent, _, leaf = path.rpartition(".")
                setattr(self.specialists[name].get_submodule(parent), leaf, PPMissingLayer())


def _find_head(specialist: nn.Module, name: str) -> tuple[str, Any]:
    """Where a specialist's head is: a layer of its own, or the embeddings that it is tied to."""
    embeddings = [(path, part) for path, part in specialist.named_modules() if isinstance(part, VocabParallelEmbedding)]
    heads = [(path, part) for path, part in embeddings if isinstance(part, ParallelLMHead)] or embeddings
    if len(heads) != 1 or getattr(heads[0][1], "bias", None) is not None:
        raise ModelError(
            f"specialist {name!r} is a {type(specialist).__name__} of vLLM, which has no single head without bias: "
            "it cannot be served in a fusion by vLLM"
        )
    return heads[0]


def _logit_scale(specialist: nn.Module, name: str) -> float:
    """What the architecture multiplies its logits by; what it does to them otherwise cannot be joined."""
    processor: Any = getattr(specialist, "logits_processor", None)
    if processor is None or processor.soft_cap is not None:
        raise ModelError(
            f"specialist {name!r} is a {type(specialist).__name__} of vLLM, whose logits are not linear in its hidden "
            "state: it cannot be served in a fusion by vLLM"
        )
    return float(processor.scale)


@contextmanager
def _fp32() -> Iterator[None]:
    """The gate is fp32 in a model of any type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
