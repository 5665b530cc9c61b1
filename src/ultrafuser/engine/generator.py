"""EngineGenerator: the engine as a Generator, for evaluation and for whoever wants answers to many conversations."""

from __future__ import annotations

from collections.abc import Sequence

from ultrafuser.chat.messages import Conversation
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.requests import GenerationRequest, Ids, StreamEvent, TokenPiece
from ultrafuser.errors import ModelError
from ultrafuser.generation import AnswerScore, Completion, SamplingParams
from ultrafuser.model.generator import FusedGenerator


class EngineGenerator:
    """Answers conversations with an engine; scores answers as `FusedGenerator` does.

    Args:
        engine: Used by nobody else meanwhile.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        whole = not engine.runner.released and engine.model.device.type != "meta"  # ranks hold one specialist each
        self._scorer = FusedGenerator(engine.model, engine.tokenizer) if whole else None

    @property
    def names(self) -> list[str]:
        """Names of the specialists, in the order of `Completion.gate_weights`."""
        return self.engine.names

    def generate(self, conversations: Sequence[Conversation], params: SamplingParams) -> list[Completion]:
        """One completion per conversation, in order; with `params.n` the choices of each follow one another."""
        return self.answer([self.engine.encoder.encode_prompt(conversation) for conversation in conversations], params)

    def complete(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Completion]:
        """Continue token ids that no template has written: every specialist reads the same ones."""
        return self.answer([(tuple(prompt),) * len(self.names) for prompt in prompts], params)

    def answer(self, prompts: Sequence[tuple[Ids, ...]], params: SamplingParams) -> list[Completion]:
        """Answer prompts that are encoded already: one row per specialist each.

        Raises:
            RequestError: One of them can never be served.
            ModelError: The model's logits are no numbers.
        """
        requests = [GenerationRequest(tuple(rows), params) for rows in prompts]
        for request in requests:  # all are fit to be asked, or none is
            self.engine.check(request)
        errors: list[str] = []
        collectors = [_Collector(params.n, errors) for _ in requests]
        for request, collector in zip(requests, collectors, strict=True):
            self.engine.add(request, collector)
        while self.engine.step() and not errors:
            pass
        if errors:
            self.engine.fail_all("another answer failed")
            raise ModelError(errors[0])
        return [completion for collector in collectors for completion in collector.completions()]

    def score(self, conversations: Sequence[Conversation]) -> list[AnswerScore]:
        """Log-probabilities of the assistant messages of each conversation.

        Raises:
            ModelError: The engine's model has given its weights away.
        """
        if self._scorer is None:
            raise ModelError("this engine holds no whole model to score with: use FusedGenerator, or exact weights")
        return self._scorer.score(conversations)


class _Collector:
    """Listens to one request; what goes wrong joins `errors`."""

    def __init__(self, num_choices: int, errors: list[str]) -> None:
        self.errors = errors
        self.pieces: list[list[TokenPiece]] = [[] for _ in range(num_choices)]
        self.reasons: list[str] = [""] * num_choices

    def __call__(self, event: StreamEvent) -> None:
        self.pieces[event.choice] += event.pieces
        if event.finish_reason == "error":
            self.errors.append(event.error)
        if event.finish_reason is not None:
            self.reasons[event.choice] = event.finish_reason

    def completions(self) -> list[Completion]:
        return [
            Completion(
                text="".join(piece.text for piece in pieces),
                token_ids=tuple(piece.token_id for piece in pieces),
                gate_weights=tuple(piece.gate_weights for piece in pieces),
                finish_reason="length" if reason == "length" else "stop",
            )
            for pieces, reason in zip(self.pieces, self.reasons, strict=True)
        ]
