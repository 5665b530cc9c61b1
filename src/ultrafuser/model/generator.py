"""FusedGenerator: a fused model and its tokenizer as a `Generator`.

Batches conversations by length, each specialist in its own template, and reports which specialist wrote which token.
Text without a template goes through the same batches: then every specialist reads the same ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList

from ultrafuser.alignment.collate import IGNORED, collate, left_pad, micro_batches
from ultrafuser.alignment.encode import Encoder, Ids
from ultrafuser.chat.messages import Conversation
from ultrafuser.errors import ConfigError, ModelError
from ultrafuser.generation import AnswerScore, Completion, SamplingParams
from ultrafuser.model.build import read_templates
from ultrafuser.model.fused import FusedForCausalLM

NOT_A_NUMBER = "the model gives logits that are no numbers (NaN): its weights or its dtype are at fault"
LOGIT_COLUMNS = 2048  # rows x columns whose logits over the vocabulary are held at once


class ContinuationScore(NamedTuple):
    """How likely a continuation is: its log-probability (nats), and whether greedy decoding would write it."""

    log_prob: float
    is_greedy: bool


class GateRecorder(LogitsProcessor):
    """Collects the gate weights of every step of `generate()`; it changes no score, and refuses those that are none."""

    def __init__(self, model: FusedForCausalLM) -> None:
        self.model = model
        self.steps: list[Tensor] = []  # [B, N] each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called by `generate()` once for every new token."""
        del input_ids
        if scores.isnan().any():
            raise ModelError(NOT_A_NUMBER)
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

    @contextmanager
    def alone(self, specialist: str) -> Iterator[Self]:
        """Let one specialist answer and score alone, for a while."""
        config = self.model.config
        before, config.solo = config.solo, specialist
        try:
            yield self
        finally:
            config.solo = before

    def inputs(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """Arguments of `model.generate()` for conversations that wait for an answer."""
        prompts = [self.encoder.encode_prompt(conversation) for conversation in conversations]
        return {k: v.to(self.model.device) for k, v in left_pad(prompts, pad_id=self.encoder.pad_id).items()}

    @torch.no_grad()
    def generate(self, conversations: Sequence[Conversation], params: SamplingParams) -> list[Completion]:
        """One completion per conversation, in order."""
        return self._complete([self.encoder.encode_prompt(conversation) for conversation in conversations], params)

    @torch.no_grad()
    def complete(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Completion]:
        """Continue token ids that no template has written: every specialist reads the same ones."""
        return self._complete([(tuple(prompt),) * len(self.names) for prompt in prompts], params)

    def _complete(self, prompts: Sequence[Sequence[Ids]], params: SamplingParams) -> list[Completion]:
        _refuse_engine_params(params)
        if params.temperature > 0 and params.seed is not None:
            torch.manual_seed(params.seed)  # once: a seed for each batch would draw the same answers in all of them
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

    @torch.no_grad()
    def score_continuations(
        self, prompts: Sequence[Sequence[Ids]], continuations: Sequence[Ids]
    ) -> list[ContinuationScore]:
        """Log-probability of token ids after a prompt; no end token is added.

        Rows end in one column whatever their lengths, so neither batch nor padding changes a score beyond rounding.

        Args:
            prompts: For each item one row of ids per specialist, none empty; the same row n times for plain text.
            continuations: The ids to score, at least one each.

        Raises:
            ModelError: The model's logits are no numbers.
        """
        order = sorted(range(len(prompts)), key=lambda i: (len(continuations[i]), max(map(len, prompts[i]))))
        scores: dict[int, ContinuationScore] = {}
        for group in self._scoring_groups(order, prompts, continuations):
            found = self._score([prompts[i] for i in group], [continuations[i] for i in group])
            scores.update(zip(group, found, strict=True))
        return [scores[index] for index in range(len(prompts))]

    def _scoring_groups(
        self, order: Sequence[int], prompts: Sequence[Sequence[Ids]], continuations: Sequence[Ids]
    ) -> list[list[int]]:
        groups: list[list[int]] = []
        width = 0
        for index in order:
            length = len(continuations[index])
            columns = max(map(len, prompts[index])) + length
            rows = len(groups[-1]) + 1 if groups else 0
            if groups and max(columns, width) * rows <= self.batch_tokens and length * rows <= LOGIT_COLUMNS:
                groups[-1].append(index)
                width = max(columns, width)
            else:
                groups.append([index])
                width = columns
        return groups

    def _score(self, prompts: Sequence[Sequence[Ids]], continuations: Sequence[Ids]) -> list[ContinuationScore]:
        # Weights that are held must see where the prompt ends, by labels; else the last token need not be read.
        held = self.model.config.granularity == "prompt" or self.model.config.weighting == "perplexity"
        whole = [
            [(*row, *continuation)[: None if held else -1] for row in rows]
            for rows, continuation in zip(prompts, continuations, strict=True)
        ]
        inputs = left_pad(whole, pad_id=self.encoder.pad_id)
        longest = max(map(len, continuations))
        targets = torch.full((len(prompts), longest), IGNORED)
        for row, continuation in enumerate(continuations):
            targets[row, -len(continuation) :] = torch.tensor(continuation)
        if held:
            inputs["labels"] = torch.full_like(inputs["input_ids"], IGNORED)
            inputs["labels"][:, -longest:] = targets
        inputs = {key: value.to(self.model.device) for key, value in inputs.items()}
        logits = self.model(**inputs, logits_to_keep=longest + held).logits[:, :longest].float()
        targets = targets.to(logits.device)
        real = targets != IGNORED
        log_probs = logits.log_softmax(dim=-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        if log_probs[real].isnan().any():
            raise ModelError(NOT_A_NUMBER)
        totals = log_probs.double().masked_fill(~real, 0.0).sum(dim=-1)
        greedy = ((logits.argmax(dim=-1) == targets) | ~real).all(dim=-1)
        return [ContinuationScore(*pair) for pair in zip(totals.tolist(), greedy.tolist(), strict=True)]

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


_OWN_PARAMS = frozenset({"max_tokens", "temperature", "top_p", "top_k", "stop", "seed"})


def _refuse_engine_params(params: SamplingParams) -> None:
    """Refuse, and do not ignore, what only the engine can do."""
    for field in fields(params):
        if field.name not in _OWN_PARAMS and getattr(params, field.name) != field.default:
            raise ConfigError(f"{field.name} is known to the engine alone: use EngineGenerator")
