"""FusedGenerator: a fused model and its tokenizer as a `Generator`.

Batches conversations by length, each specialist in its own template, and reports which specialist wrote which token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList

from ultrafuser.alignment.collate import collate, left_pad, micro_batches
from ultrafuser.alignment.encode import Encoder
from ultrafuser.chat.messages import Conversation
from ultrafuser.errors import ModelError
from ultrafuser.generation import AnswerScore, Completion, SamplingParams
from ultrafuser.model.build import read_templates
from ultrafuser.model.fused import FusedForCausalLM


class GateRecorder(LogitsProcessor):
    """Collects the gate weights of every step of `generate()`; it changes no score."""

    def __init__(self, model: FusedForCausalLM) -> None:
        self.model = model
        self.steps: list[Tensor] = []  # [B, N] each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called by `generate()` once for every new token."""
        del input_ids
        assert self.model.last_gate_weights is not None, "generate() runs the model before its processors"
        self.steps.append(self.model.last_gate_weights[:, -1].cpu())
        return scores


class FusedGenerator:
    """Answers conversations with a fused model.

    Args:
        model: Built with templates.
        tokenizer: The shared tokenizer.
        batch_tokens: Rows x columns of one batch, at most.

    Raises:
        ModelError: The model has no templates.
    """

    def __init__(self, model: FusedForCausalLM, tokenizer: Any, *, batch_tokens: int = 16384) -> None:
        templates = read_templates(model.config)
        if not templates:
            raise ModelError(
                "the model has no templates: build it with templates=..., so that it can read conversations"
            )
        self.model = model.train(False)
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer, templates)
        self.batch_tokens = batch_tokens

    @classmethod
    def from_pretrained(cls, folder: str, **kwargs: Any) -> Self:
        """Load a model folder; further arguments as in `FusedForCausalLM.from_pretrained`."""
        model = FusedForCausalLM.from_pretrained(folder, **kwargs)
        return cls(model, AutoTokenizer.from_pretrained(folder))

    @property
    def names(self) -> list[str]:
        """Names of the specialists, in the order of `Completion.gate_weights`."""
        names: list[str] = self.model.names
        return names

    def inputs(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """Arguments of `model.generate()` for conversations that wait for an answer."""
        prompts = [self.encoder.encode_prompt(conversation) for conversation in conversations]
        return {k: v.to(self.model.device) for k, v in left_pad(prompts, pad_id=self.encoder.pad_id).items()}

    @torch.no_grad()
    def generate(self, conversations: Sequence[Conversation], params: SamplingParams) -> list[Completion]:
        """One completion per conversation, in order."""
        prompts = [self.encoder.encode_prompt(conversation) for conversation in conversations]
        order = sorted(range(len(prompts)), key=lambda i: max(len(row) for row in prompts[i]))
        completions: list[Completion | None] = [None] * len(prompts)
        for group in self._groups(order, prompts, params.max_tokens):
            for index, completion in zip(group, self._generate([prompts[i] for i in group], params), strict=True):
                completions[index] = completion
        return [completion for completion in completions if completion is not None]

    @torch.no_grad()
    def score(self, conversations: Sequence[Conversation]) -> list[AnswerScore]:
        """Log-probabilities of the assistant messages of each conversation."""
        records = [
            self.encoder.encode(conversation, id=f"{index:09d}", domain="")
            for index, conversation in enumerate(conversations)
        ]
        scores: list[AnswerScore | None] = [None] * len(records)
        for piece in micro_batches(records, max_columns=self.batch_tokens):
            batch = collate(piece, pad_id=self.encoder.pad_id)
            nll, weights, _ = self.model.response_nll(**batch.tensors(self.model.device))
            lengths = [record.num_response_tokens for record in piece]
            for record, values, rows in zip(piece, nll.split(lengths), weights.split(lengths), strict=True):
                scores[int(record.id)] = AnswerScore(
                    tuple((-values).tolist()), tuple(tuple(row) for row in rows.tolist())
                )
        return [score for score in scores if score is not None]

    def _groups(self, order: Sequence[int], prompts: Sequence[Any], max_tokens: int) -> list[list[int]]:
        groups: list[list[int]] = []
        for index in order:
            columns = max(len(row) for row in prompts[index]) + max_tokens
            if groups and columns * (len(groups[-1]) + 1) <= self.batch_tokens:
                groups[-1].append(index)
            else:
                groups.append([index])
        return groups

    def _generate(self, prompts: Sequence[Any], params: SamplingParams) -> list[Completion]:
        recorder = GateRecorder(self.model)
        inputs = {k: v.to(self.model.device) for k, v in left_pad(prompts, pad_id=self.encoder.pad_id).items()}
        sampling: dict[str, Any] = {"do_sample": False}
        if params.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k,
            }
            if params.seed is not None:
                torch.manual_seed(params.seed)
        if params.stop:
            sampling |= {"stop_strings": list(params.stop), "tokenizer": self.tokenizer}
        output = self.model.generate(
            **inputs,
            **sampling,
            max_new_tokens=params.max_tokens,
            logits_processor=LogitsProcessorList([recorder]),
        )
        responses = output[:, inputs["input_ids"].shape[1] :].tolist()
        weights = torch.stack(recorder.steps, dim=1).tolist()
        return [self._completion(ids, rows, params) for ids, rows in zip(responses, weights, strict=True)]

    def _completion(self, ids: list[int], weights: list[list[float]], params: SamplingParams) -> Completion:
        ends = self.model.generation_config.eos_token_id or []
        stops = set(ends if isinstance(ends, list) else [ends])
        length = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        finished = length < len(ids)
        ids = ids[:length]
        text = self._text(ids)
        cut = min((at for stop in params.stop if (at := text.find(stop)) >= 0), default=None)
        if cut is not None:
            # `generate()` fills a row that has met its stop string with padding while others go on.
            complete = (i for i in range(1, length + 1) if any(stop in self._text(ids[:i]) for stop in params.stop))
            ids = ids[: next(complete, length)]
            text, finished = text[:cut], True
        return Completion(
            text=text,
            token_ids=tuple(ids),
            gate_weights=tuple(tuple(row) for row in weights[: len(ids)]),
            finish_reason="stop" if finished else "length",
        )

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
