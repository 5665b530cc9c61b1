"""What clients get: OpenAI's objects, with our `fusion` beside the choices and `fusion_mean` in the usage."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Finish = Literal["stop", "length"]


class _Reply(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class FusedToken(_Reply):
    """One token of an answer and who wrote it."""

    token_id: int
    text: str
    weights: list[float] = Field(description="One per specialist, in the order of /v1/models; they sum to 1.")


class Usage(_Reply):
    """Tokens read and written. A prompt counts once, by its longest row over the specialists."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    fusion_mean: dict[str, float] | None = Field(default=None, description="Mean weight, with `fusion.weights`.")


class Alternative(_Reply):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Alternative):
    """A token of the answer among its alternatives."""

    top_logprobs: list[Alternative]


class ChatLogprobs(_Reply):
    """Log-probabilities of a chat answer."""

    content: list[TokenLogprob]
    refusal: None = None


class ReplyMessage(_Reply):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(_Reply):
    """One answer of a chat completion."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish
    fusion: list[FusedToken] | None = None


class ChatCompletion(_Reply):
    """Reply of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None


class Delta(_Reply):
    """What a chunk adds to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Reply):
    """One answer's part of a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None
    fusion: list[FusedToken] | None = None


class ChatChunk(_Reply):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class CompletionLogprobs(_Reply):
    """Log-probabilities of a completion, in the older shape."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Reply):
    """One answer of a completion, or its part of a chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None = None
    fusion: list[FusedToken] | None = None


class TextCompletion(_Reply):
    """Reply of `POST /v1/completions`, and one event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class FusionCard(_Reply):
    """What a client must know to use the fusion."""

    specialists: list[str]
    max_context: int = Field(description="Tokens of prompt and answer together.")


class ModelCard(_Reply):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ultrafuser"
    fusion: FusionCard


class ModelList(_Reply):
    """Reply of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(_Reply):
    """Reply of `POST /tokenize`: `tokens` of a text; for messages one row per specialist."""

    count: int = Field(description="Of the longest row.")
    max_model_len: int
    tokens: list[int] | None = None
    specialists: dict[str, list[int]] | None = None


class Detokenized(_Reply):
    """Reply of `POST /detokenize`; special tokens are left out."""

    prompt: str


class Health(_Reply):
    """Reply of `GET /health`."""

    status: Literal["ok"] = "ok"


class Version(_Reply):
    """Reply of `GET /version`."""

    version: str


class ErrorDetail(_Reply):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(_Reply):
    """Every reply that is no success."""

    error: ErrorDetail


def as_json(reply: BaseModel) -> Any:
    """A reply as an object; what was not asked for (`fusion`, `fusion_mean`) is left out rather than null."""
    return _without_absent(reply.model_dump(mode="json"))


def _without_absent(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_absent(item)
            for key, item in value.items()
            if item is not None or key not in ("fusion", "fusion_mean", "role", "tokens", "specialists")
        }
    return [_without_absent(item) for item in value] if isinstance(value, list) else value
