"""Replies of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ultrafuser.engine.requests import StreamEvent, TokenPiece
from ultrafuser.server.compose import Composer, json_log_prob, text_of
from ultrafuser.server.replies import (
    Alternative,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    Finish,
    ReplyMessage,
    TokenLogprob,
)


class ChatComposer(Composer):
    """Composes chat completions."""

    prefix = "chatcmpl"

    def whole(self) -> ChatCompletion:
        """The reply to a client that does not stream."""
        choices = [
            ChatChoice(
                index=index,
                message=ReplyMessage(content=text_of(pieces)),
                logprobs=self._log_probs(pieces),
                finish_reason=self._finish[index],
                fusion=self.fused(pieces),
            )
            for index, pieces in enumerate(self._pieces)
        ]
        return ChatCompletion(
            id=self.id, created=self.created, model=self.model_name, choices=choices, usage=self.usage()
        )

    def opening(self) -> Iterator[ChatChunk]:
        """Each answer begins by saying whose it is."""
        for index in range(self.num_choices):
            yield self._chunk(ChatChunkChoice(index=index, delta=Delta(role="assistant", content="")))

    def chunk(self, choice: int, event: StreamEvent) -> ChatChunk:
        """What an event adds."""
        finish: Finish | None = self._finish.get(choice)
        return self._chunk(
            ChatChunkChoice(
                index=choice,
                delta=Delta(content=text_of(event.pieces)),
                logprobs=self._log_probs(event.pieces),
                finish_reason=finish,
                fusion=self.fused(event.pieces),
            )
        )

    def closing(self) -> ChatChunk:
        """The usage."""
        return ChatChunk(id=self.id, created=self.created, model=self.model_name, choices=[], usage=self.usage())

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model_name, choices=[choice])

    def _log_probs(self, pieces: Sequence[TokenPiece]) -> ChatLogprobs | None:
        if not self.with_log_probs:
            return None
        return ChatLogprobs(
            content=[
                TokenLogprob(
                    **self._alternative(piece.token_id, piece.log_prob).model_dump(),
                    top_logprobs=[self._alternative(token, value) for token, value in piece.top],
                )
                for piece in pieces
            ]
        )

    def _alternative(self, token: int, log_prob: float | None) -> Alternative:
        return Alternative(
            token=self.tokens.text(token), logprob=json_log_prob(log_prob), bytes=list(self.tokens.raw(token))
        )
