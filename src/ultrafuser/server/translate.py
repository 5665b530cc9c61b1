"""From a client's request to the engine's: prompts encoded, fields checked against the model, defaults filled in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

from ultrafuser.chat.messages import Message
from ultrafuser.engine.requests import GenerationRequest, Ids
from ultrafuser.engine.thread import EngineThread
from ultrafuser.errors import UltrafuserError
from ultrafuser.generation import SamplingParams
from ultrafuser.server.api_error import ApiError, from_ours
from ultrafuser.server.protocol import ChatMessage, ChatRequest, CompletionRequest
from ultrafuser.server.settings import ServerSettings

Body = ChatRequest | CompletionRequest
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
Given = TypeVar("Given")


class Translator:
    """Makes engine requests.

    Args:
        engine: Encodes, and says what it can do.
        settings: Limits.
        executor: Where templates and the tokenizer run, so that a long text does not stop the server.
    """

    def __init__(self, engine: EngineThread, settings: ServerSettings, executor: Executor) -> None:
        self.engine, self.settings, self.executor = engine, settings, executor

    async def chat(self, body: ChatRequest) -> list[GenerationRequest]:
        """The one request of a chat completion. Raises ApiError."""
        self.check_model(body.model)
        prompts = await self.encode_messages(body.messages)
        asked = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
        return [self._request(body, prompts, asked, default=self.engine.max_context)]

    async def completion(self, body: CompletionRequest) -> list[GenerationRequest]:
        """One request per prompt. Raises ApiError."""
        self.check_model(body.model)
        prompts, limits = body.prompts, self.settings.limits
        if len(prompts) > limits.num_prompts:
            raise ApiError(400, f"{len(prompts):,} prompts are over the {limits.num_prompts}", param="prompt")
        if len(prompts) * (body.n or 1) > limits.num_choices:
            raise ApiError(400, f"prompts times n are over the {limits.num_choices}", param="n")
        requests = []
        for prompt in prompts:
            if isinstance(prompt, str):
                rows = await self.encode_text(prompt)
            else:
                self.check_ids(prompt, "prompt")
                rows = (tuple(prompt),) * len(self.engine.names)
            requests.append(self._request(body, rows, body.max_tokens, default=COMPLETION_TOKENS))
        return requests

    async def encode_messages(self, messages: Sequence[ChatMessage]) -> tuple[Ids, ...]:
        """One row per specialist. Raises ApiError."""
        conversation = tuple(Message(message.role, message.text) for message in messages)
        return await self._encode(self.engine.encode_conversation, conversation, "messages")

    async def encode_text(self, text: str) -> tuple[Ids, ...]:
        """Plain text, the same row for every specialist. Raises ApiError."""
        return await self._encode(self.engine.encode_text, text, "prompt")

    def check_model(self, name: str | None) -> None:
        """Only the model that is served: nothing is ever looked up by a client's name. Raises ApiError."""
        if name is not None and name != self.settings.model_name:
            message = f"there is no such model here: this server has {self.settings.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Every id must be in the vocabulary. Raises ApiError."""
        wrong = next((token for token in ids if not 0 <= token < self.engine.vocab_size), None)
        if wrong is not None:
            message = f"there is no token {wrong}: the vocabulary has ids from 0 to {self.engine.vocab_size - 1}"
            raise ApiError(400, message, param=param, code="invalid_token_id")

    async def _encode(self, encode: Callable[[Given], tuple[Ids, ...]], given: Given, param: str) -> tuple[Ids, ...]:
        work = asyncio.get_running_loop().run_in_executor(self.executor, encode, given)
        try:
            async with asyncio.timeout(self.settings.deadlines.encode_s):
                rows = await work
        except TimeoutError:
            raise ApiError(400, "this text takes too long to tokenise: shorten it", param=param) from None
        except UltrafuserError as error:
            refusal = from_ours(error)
            refusal.param = refusal.param or param
            raise refusal from error
        if not all(rows):
            raise ApiError(400, "the prompt is empty: there is nothing to predict from", param=param)
        return rows

    def _request(self, body: Body, prompts: tuple[Ids, ...], asked: int | None, *, default: int) -> GenerationRequest:
        longest = max(len(row) for row in prompts)
        room = self.engine.max_context - longest
        cap = self.settings.limits.max_tokens or self.engine.max_context
        param = "messages" if isinstance(body, ChatRequest) else "prompt"
        if room < 1:
            message = f"the prompt takes {longest:,} tokens, the context holds {self.engine.max_context:,}: shorten it"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        if asked is not None and asked > min(room, cap):
            message = f"max_tokens is {asked:,}; after this prompt of {longest:,} at most {min(room, cap):,} can come"
            raise ApiError(400, message, param="max_tokens", code="context_length_exceeded")
        max_tokens = asked if asked is not None else min(default, room, cap)
        fusion = body.fusion
        return GenerationRequest(
            prompts=prompts,
            params=self._params(body, max_tokens),
            without=tuple(fusion.without or ()) if fusion else (),
            weights=fusion.override if fusion else None,
            score_prompt=isinstance(body, CompletionRequest) and bool(body.echo) and body.logprobs is not None,
        )

    def _params(self, body: Body, max_tokens: int) -> SamplingParams:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        self.check_ids(list(bias), "logit_bias")
        self.check_ids(body.stop_token_ids or [], "stop_token_ids")
        if (body.min_tokens or 0) > max_tokens:
            raise ApiError(400, f"min_tokens is over the {max_tokens:,} tokens that can come", param="min_tokens")
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else float(body.temperature),
            top_p=1.0 if body.top_p is None else float(body.top_p),
            top_k=body.top_k or 0,
            stop=tuple(stop),
            seed=body.seed,
            min_p=float(body.min_p or 0.0),
            presence_penalty=float(body.presence_penalty or 0.0),
            frequency_penalty=float(body.frequency_penalty or 0.0),
            repetition_penalty=1.0 if body.repetition_penalty is None else float(body.repetition_penalty),
            logit_bias=tuple((token, float(value)) for token, value in bias.items()),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            min_tokens=body.min_tokens or 0,
            ignore_end=bool(body.ignore_eos),
            log_probs=body.num_alternatives,
            n=body.n or 1,
        )
