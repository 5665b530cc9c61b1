"""One choice of a request: what it has read and written, and what each specialist has seen of it.

A *view* is what one specialist reads: its own prompt, then the response that all share. A drafting model has a view,
too, after those of the specialists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch import Tensor

from ultrafuser.engine.detokenize import Detokenizer, HeldPieces
from ultrafuser.engine.requests import FinishReason, GenerationRequest, Ids, StreamEvent, TokenPiece
from ultrafuser.engine.sampling import Sampler


class State(Enum):
    """Where a choice stands."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


class Choice:
    """One choice.

    Args:
        request: What was asked.
        choice: Its number.
        rows: The prompt of each view.
        weights: Fixed weights [N], or None where the gate decides.
        active: Which specialists run.
        sampler: Chooses its tokens.
        detokenizer: Makes their text.
        listener: Gets its events.
        ends: Ids that end it.
        max_tokens: Tokens it may write, the limit of the context included.
    """

    def __init__(
        self,
        request: GenerationRequest,
        choice: int,
        *,
        rows: Sequence[Ids],
        weights: Tensor | None,
        active: Sequence[bool],
        sampler: Sampler,
        detokenizer: Detokenizer,
        listener: Callable[[StreamEvent], None],
        ends: frozenset[int],
        max_tokens: int,
    ) -> None:
        self.request, self.choice, self.listener = request, choice, listener
        self.rows, self.weights, self.active = tuple(rows), weights, tuple(active)
        self.sampler, self.detokenizer = sampler, detokenizer
        self.held = HeldPieces(request.params.stop)
        self.ends, self.max_tokens = ends, max_tokens
        self.state = State.WAITING
        self.response: list[int] = []
        self.seen = [0] * len(self.rows)  # tokens of each view that are in its cache
        self.slot = -1
        self.cancelled = False
        self.last_weights: tuple[float, ...] = ()
        self.held_scores: Tensor | None = None  # [N]: where weights are held from the prompt
        self.prompt_nll: list[tuple[float, int]] = [(0.0, 0)] * len(self.rows)  # summed nats and tokens, of each view
        self.prompt_pieces: list[TokenPiece] = []
        self.tails: dict[int, Tensor] = {}  # last hidden state [H] of each view's prompt so far

    def view_length(self, view: int) -> int:
        """Tokens of a view so far."""
        return len(self.rows[view]) + len(self.response)

    def pending(self, view: int) -> Sequence[int]:
        """Tokens of a view that are not in its cache."""
        seen, row = self.seen[view], self.rows[view]
        if seen >= len(row):
            return self.response[seen - len(row) :]
        return (*row[seen:], *self.response)

    @property
    def longest_view(self) -> int:
        """Tokens of the longest view in a cache."""
        return max(self.seen)

    def fork(self, source: Choice) -> None:
        """Start from the prompt that another choice has read; its cache was copied."""
        self.seen = list(source.seen)
        self.held_scores = source.held_scores
        self.detokenizer = source.detokenizer.copy()  # which a scored prompt has moved on

    def append(
        self, token: int, weights: tuple[float, ...], log_prob: float | None, top: tuple[tuple[int, float], ...]
    ) -> tuple[list[TokenPiece], FinishReason | None]:
        """Take a token: pieces that may be shown, and why it is the last one, if it is.

        An end token or stop token is no part of the answer. The last tokens may be held back no longer.
        """
        self.last_weights = weights
        params = self.request.params
        ends_here = (token in self.ends and not params.ignore_end) or token in params.stop_token_ids
        self.response.append(token)
        if ends_here:
            return self.held.flush(self.detokenizer.flush()), "stop"
        piece = TokenPiece(token, self.detokenizer.push(token), weights, log_prob, top)
        pieces, stopped = self.held.push(piece)
        if stopped:
            return pieces, "stop"
        if len(self.response) >= self.max_tokens:
            return [*pieces, *self.held.flush(self.detokenizer.flush())], "length"
        return pieces, None

    def emit(self, pieces: Sequence[TokenPiece], reason: FinishReason | None = None, error: str = "") -> None:
        """Tell the listener."""
        prompt, self.prompt_pieces = tuple(self.prompt_pieces), []
        if pieces or prompt or reason is not None:
            self.listener(StreamEvent(self.choice, tuple(pieces), reason, error, prompt))


def fixed_weights(names: Sequence[str], request: GenerationRequest) -> tuple[Tensor | None, list[bool]]:
    """The weights that a request fixes [N], or None, and which specialists run."""
    if request.weights is None:
        return None, [name not in request.without for name in names]
    values = [0.0 if name in request.without else float(request.weights.get(name, 0.0)) for name in names]
    total = sum(values)
    return torch.tensor([value / total for value in values]), [value > 0 for value in values]
