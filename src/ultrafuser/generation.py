"""What every source of text speaks: sampling parameters in, completions out.

A fused model, an engine, a remote endpoint and a scripted fake all are a `Generator`, so evaluation
and serving need to know none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ultrafuser.chat.messages import Conversation


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. The defaults are greedy decoding."""

    max_tokens: int = 256
    temperature: float = 0.0  # 0 takes the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer.

    Attributes:
        text: The answer without its end token.
        token_ids: Ids of the answer, end token excluded.
        gate_weights: One row per token, one weight per specialist; empty where the source has no gate.
        finish_reason: "stop" (an end token or stop string) or "length" (`max_tokens` reached).
    """

    text: str
    token_ids: tuple[int, ...] = ()
    gate_weights: tuple[tuple[float, ...], ...] = ()
    finish_reason: Literal["stop", "length"] = "stop"


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """How likely a generator finds given answers: one log-probability (nats) per response token, end token included."""

    log_probs: tuple[float, ...]
    gate_weights: tuple[tuple[float, ...], ...] = field(default=())

    @property
    def num_tokens(self) -> int:
        """Response tokens, end token included."""
        return len(self.log_probs)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return -sum(self.log_probs) / len(self.log_probs)


class Generator(Protocol):
    """Anything that answers conversations and scores answers."""

    def generate(self, conversations: Sequence[Conversation], params: SamplingParams) -> list[Completion]:
        """One completion per conversation; each conversation ends with a user message."""
        ...

    def score(self, conversations: Sequence[Conversation]) -> list[AnswerScore]:
        """Score the assistant messages of each conversation."""
        ...
