"""From the engine's events to replies: what chat and plain completions have in common.

A composer is fed every event once. It gives chunks on the way, or the whole at the end.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from pydantic import BaseModel

from ultrafuser.engine.requests import GenerationRequest, StreamEvent, TokenPiece
from ultrafuser.server.protocol import ChatRequest, CompletionRequest
from ultrafuser.server.replies import Finish, FusedToken, Usage
from ultrafuser.server.token_text import TokenText

LOWEST_LOG_PROB = -9999.0  # JSON has no minus infinity; vLLM's value
_DIGITS = 6  # of a weight


class Composer(ABC):
    """Collects the answers to one request.

    Args:
        body: What the client asked.
        requests: What the engine was asked, one per prompt.
        model_name: As the reply should call it.
        names: Specialists, in the order of the weights.
        tokens: How to write single tokens.
    """

    prefix: str  # of the reply's id

    def __init__(
        self,
        body: ChatRequest | CompletionRequest,
        requests: Sequence[GenerationRequest],
        *,
        model_name: str,
        names: Sequence[str],
        tokens: TokenText,
    ) -> None:
        self.names, self.tokens, self.model_name = list(names), tokens, model_name
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.with_weights = body.fusion is not None and body.fusion.weights
        self.with_log_probs = body.num_alternatives is not None
        self.with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        self.num_per_prompt = requests[0].params.n
        self.num_choices = self.num_per_prompt * len(requests)
        self._num_prompt_tokens = sum(max(len(row) for row in request.prompts) for request in requests)
        self._pieces: list[list[TokenPiece]] = [[] for _ in range(self.num_choices)]
        self._prompts: dict[int, tuple[TokenPiece, ...]] = {}
        self._finish: dict[int, Finish] = {}

    def add(self, choice: int, event: StreamEvent) -> None:
        """Take in an event."""
        self._pieces[choice] += event.pieces
        if event.prompt:
            self._prompts[choice // self.num_per_prompt] = event.prompt
        if event.finish_reason == "stop" or event.finish_reason == "length":
            self._finish[choice] = event.finish_reason

    @abstractmethod
    def whole(self) -> BaseModel:
        """The reply to a client that does not stream; after the last event."""

    @abstractmethod
    def opening(self) -> Iterator[BaseModel]:
        """Chunks that come before the first token."""

    @abstractmethod
    def chunk(self, choice: int, event: StreamEvent) -> BaseModel:
        """What an event adds."""

    @abstractmethod
    def closing(self) -> BaseModel:
        """The chunk with the usage, which has no choices."""

    def says_something(self, event: StreamEvent) -> bool:
        """Whether an event is worth a chunk: text, an end, or something that was asked for with every token."""
        per_token = bool(event.pieces) and (self.with_weights or self.with_log_probs)
        return per_token or event.finish_reason is not None or any(piece.text for piece in event.pieces)

    def usage(self) -> Usage:
        """Tokens so far."""
        written = sum(len(pieces) for pieces in self._pieces)
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=written,
            total_tokens=self._num_prompt_tokens + written,
            fusion_mean=self._mean_weights() if self.with_weights else None,
        )

    def fused(self, pieces: Sequence[TokenPiece]) -> list[FusedToken] | None:
        """Who wrote these tokens, for clients that asked."""
        if not self.with_weights:
            return None
        return [
            FusedToken(
                token_id=piece.token_id,
                text=piece.text,
                weights=[round(weight, _DIGITS) for weight in piece.gate_weights],
            )
            for piece in pieces
        ]

    def _mean_weights(self) -> dict[str, float]:
        rows = [piece.gate_weights for pieces in self._pieces for piece in pieces if piece.gate_weights]
        if not rows:
            return {}
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        return {name: round(mean, _DIGITS) for name, mean in zip(self.names, means, strict=True)}


def text_of(pieces: Sequence[TokenPiece]) -> str:
    """What tokens add to the text."""
    return "".join(piece.text for piece in pieces)


def json_log_prob(value: float | None) -> float:
    """A log-probability that JSON can hold."""
    return LOWEST_LOG_PROB if value is None else max(value, LOWEST_LOG_PROB)
