"""Replies of /v1/completions, with `echo`: lm-eval reads the log-probabilities of a prompt from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ultrafuser.engine.requests import GenerationRequest, StreamEvent, TokenPiece
from ultrafuser.server.compose import Composer, json_log_prob, text_of
from ultrafuser.server.protocol import CompletionRequest
from ultrafuser.server.replies import CompletionChoice, CompletionLogprobs, TextCompletion


class TextComposer(Composer):
    """Composes plain completions.

    Args:
        body, requests, more: As `Composer` has them.
        prompts: The text of every prompt, for `echo`; else empty.
    """

    prefix = "cmpl"

    def __init__(
        self, body: CompletionRequest, requests: Sequence[GenerationRequest], *, prompts: Sequence[str], **more: Any
    ) -> None:
        super().__init__(body, requests, **more)
        self.echoed = list(prompts) if body.echo else [""] * len(requests)
        self._length = [len(self._echo(index)) for index in range(self.num_choices)]  # of the text so far

    def whole(self) -> TextCompletion:
        """The reply to a client that does not stream."""
        choices = [
            CompletionChoice(
                index=index,
                text=self._echo(index) + text_of(pieces),
                logprobs=self._log_probs([*self._prompts.get(index // self.num_per_prompt, ()), *pieces], begin=0),
                finish_reason=self._finish[index],
                fusion=self.fused(pieces),
            )
            for index, pieces in enumerate(self._pieces)
        ]
        return self._reply(choices).model_copy(update={"usage": self.usage()})

    def opening(self) -> Iterator[TextCompletion]:
        """The prompts, where they are echoed."""
        for index in range(self.num_choices):
            if self._echo(index):
                yield self._reply([CompletionChoice(index=index, text=self._echo(index))])

    def chunk(self, choice: int, event: StreamEvent) -> TextCompletion:
        """What an event adds."""
        text, begin = text_of(event.pieces), self._length[choice]
        self._length[choice] += len(text)
        return self._reply(
            [
                CompletionChoice(
                    index=choice,
                    text=text,
                    logprobs=self._log_probs(event.pieces, begin=begin),
                    finish_reason=self._finish.get(choice),
                    fusion=self.fused(event.pieces),
                )
            ]
        )

    def closing(self) -> TextCompletion:
        """The usage."""
        return self._reply([]).model_copy(update={"usage": self.usage()})

    def _echo(self, choice: int) -> str:
        return self.echoed[choice // self.num_per_prompt]

    def _reply(self, choices: list[CompletionChoice]) -> TextCompletion:
        return TextCompletion(id=self.id, created=self.created, model=self.model_name, choices=choices)

    def _log_probs(self, pieces: Sequence[TokenPiece], *, begin: int) -> CompletionLogprobs | None:
        if not self.with_log_probs:
            return None
        offsets, at = [], begin
        for piece in pieces:
            offsets.append(at)
            at += len(piece.text)
        return CompletionLogprobs(
            tokens=[self.tokens.text(piece.token_id) for piece in pieces],
            token_logprobs=[None if piece.log_prob is None else json_log_prob(piece.log_prob) for piece in pieces],
            top_logprobs=[None if piece.log_prob is None else self._top(piece) for piece in pieces],
            text_offset=offsets,
        )

    def _top(self, piece: TokenPiece) -> dict[str, float]:
        """By text; of tokens with the same text the likeliest. The token itself is always there."""
        top: dict[str, float] = {}
        for token, value in (*piece.top, (piece.token_id, piece.log_prob)):
            top.setdefault(self.tokens.text(token), json_log_prob(value))
        return top
