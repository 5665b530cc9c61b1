"""What goes into the engine and what comes out: requests, events, figures. No tensors, no models.

A request has one prompt per specialist and gives `params.n` choices. What a choice writes comes as events, each with
the tokens that may be shown: text that could still turn out to be the beginning of a stop string is held back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ultrafuser.generation import SamplingParams

Ids = tuple[int, ...]
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One question to the engine.

    Attributes:
        prompts: Token ids, one row per specialist in the model's order; `EngineThread.encode_*` makes them.
        params: How to choose tokens, and how many choices.
        without: Specialists that are left out: they do not run, and the gate weighs the others.
        weights: Fixed weights in place of the gate's, by name, of at least one specialist, not negative; scaled to a
            sum of 1. A specialist that is not named, or weighs 0, does not run.
        score_prompt: Give the log-probability of every prompt token, too; only where all rows are the same.
    """

    prompts: tuple[Ids, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    without: tuple[str, ...] = ()
    weights: Mapping[str, float] | None = None
    score_prompt: bool = False


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """One token of an answer (or of a scored prompt).

    Attributes:
        token_id: Its id.
        text: What it adds to the text; empty in the middle of a character, cut where a stop string begins.
        gate_weights: One weight per specialist, 0 for those left out; empty for tokens of a prompt.
        log_prob: Its log-probability (nats) under the fused distribution before temperature, penalties and cuts; None
            unless asked for, and for the first token of a prompt.
        top: The most likely tokens there and their log-probabilities, most likely first.
    """

    token_id: int
    text: str
    gate_weights: tuple[float, ...] = ()
    log_prob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """News of one choice.

    Attributes:
        choice: 0 to n - 1.
        pieces: New tokens, in order. Joined over all events their texts are the answer.
        finish_reason: None while more will come. The last event of a choice has one: "stop" (end token, stop token or
            stop string), "length", "cancelled", or "error".
        error: What went wrong, where the reason is "error".
        prompt: The scored prompt, in the first event of choice 0, where it was asked for.
    """

    choice: int
    pieces: tuple[TokenPiece, ...] = ()
    finish_reason: FinishReason | None = None
    error: str = ""
    prompt: tuple[TokenPiece, ...] = ()


Listener = Callable[[StreamEvent], None]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine is doing and has done.

    Attributes:
        num_running: Choices that hold a slot.
        num_waiting: Choices that wait for one.
        num_slots: Choices that can run at once.
        cached_tokens: Tokens in the caches of running choices, of the specialist with the longest view.
        prompt_tokens, generated_tokens: Since the start; a prompt counts once, by its longest row.
        drafted_tokens, accepted_tokens: Of speculation, since the start.
        steps: Passes of the model since the start.
        skipped_passes: Passes of one specialist that were left out (`EngineOptions.skip_below`).
        audited_tokens, agreed_tokens: Tokens at which that was checked, and those that it did not change.
    """

    num_running: int
    num_waiting: int
    num_slots: int
    cached_tokens: int
    prompt_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    steps: int
    skipped_passes: int = 0
    audited_tokens: int = 0
    agreed_tokens: int = 0


class RequestHandle(Protocol):
    """A request that was taken."""

    def cancel(self) -> None:
        """Stop all its choices and free their slots; each ends with "cancelled". Harmless when it is over."""
        ...
