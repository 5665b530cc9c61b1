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
    stop: tuple[str, ...] = ()  # not part of the answer
    seed: int | None = None
    # The engine alone knows the following.
    min_p: float = 0.0  # drops tokens less likely than this share of the most likely one
    presence_penalty: float = 0.0  # off the logit of every token that the response has
    frequency_penalty: float = 0.0  # off the logit, for each time that the response has the token
    repetition_penalty: float = 1.0  # divides (multiplies, if negative) logits of tokens of prompt and response
    logit_bias: tuple[tuple[int, float], ...] = ()  # added to the logits of these ids
    stop_token_ids: tuple[int, ...] = ()  # end a response like the end token
    min_tokens: int = 0  # before that many the end and stop tokens are impossible
    ignore_end: bool = False  # go on after end tokens, to `max_tokens`
    log_probs: int | None = None  # that many likely alternatives at every token; 0: the token's own alone
    n: int = 1  # choices, each with a seed of its own


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
