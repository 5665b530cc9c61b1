"""What clients may send: OpenAI's fields, vLLM's sampling fields, ours; strict types, closed ranges, nothing else.

A field that is not here is refused, so nobody believes in a switch that does nothing. `null` is as good as left out.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_TEXT = 512 * 2**10  # characters of one message or prompt
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Weight = Annotated[float, Field(ge=0.0, le=1e6)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class FusionOptions(_Strict):
    """Our extension: what to tell about the fusion, and how to steer it."""

    weights: bool = Field(default=False, description="Tell the weight of every specialist at every token.")
    override: dict[Name, Weight] | None = Field(
        default=None, max_length=64, description="Fixed weights in place of the gate's; who is not named does not run."
    )
    without: list[Name] | None = Field(default=None, max_length=64, description="Specialists to leave out.")


class StreamOptions(_Strict):
    """What a stream tells besides the answer."""

    include_usage: bool | None = Field(default=None, description="End with a chunk that holds the usage.")


class ResponseFormat(_Strict):
    """Plain text is all there is."""

    type: Literal["text"]


class _Sampling(_Strict):
    model: str = Field(description="Name of the model, as /v1/models gives it.")
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31, description="Longest answer, in tokens.")
    temperature: float | None = Field(default=None, ge=0.0, le=2.0, description="Default 1; 0 is greedy.")
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=0, lt=2**31, description="0 keeps all tokens.")
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10.0)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=64)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    n: int | None = Field(default=None, ge=1, le=8, description="Answers to each prompt.")
    logit_bias: (
        dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100.0, le=100.0)]]
        | None
    ) = Field(default=None, max_length=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(default=None, description="Only with `stream`.")
    user: str | None = Field(default=None, max_length=256, description="Accepted for OpenAI's clients; has no effect.")
    ignore_eos: bool | None = Field(default=None, description="Go on after end tokens.")
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    fusion: FusionOptions | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> _Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for streams: set stream to true")
        return self


class TextPart(_Strict):
    """A piece of a message. Pictures, sound and files are refused."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    """One message. Parts are joined by line breaks."""

    role: Literal["system", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]


class ChatRequest(_Sampling):
    """Body of `POST /v1/chat/completions`."""

    messages: Messages = Field(description="The last one is the user's.")
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31, description="The newer `max_tokens`.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="Only with `logprobs`.")
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: set logprobs to true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self

    @property
    def num_alternatives(self) -> int | None:
        """Likely tokens to tell at every token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


Ids = Annotated[list[TokenId], Field(min_length=1)]
Prompt = Text | Ids | Annotated[list[Text], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]


class CompletionRequest(_Sampling):
    """Body of `POST /v1/completions`. Every specialist reads the prompt as it is, without a template."""

    prompt: Prompt = Field(description="A text, token ids, or a list of either.")
    echo: bool | None = Field(default=None, description="The answer begins with the prompt.")
    logprobs: int | None = Field(default=None, ge=0, le=20, description="With `echo` those of the prompt, too.")
    best_of: int | None = Field(default=None, ge=1, le=8, description="Only if equal to `n`.")

    @model_validator(mode="after")
    def _fields_agree(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported: leave it out, or set it to n")
        if self.echo and self.stream and self.logprobs is not None:
            raise ValueError("echo with logprobs cannot be streamed: leave one of the three out")
        return self

    @property
    def num_alternatives(self) -> int | None:
        """Likely tokens to tell at every token; None for no log-probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TokenizeRequest(_Strict):
    """Body of `POST /tokenize`: a text, or messages."""

    model: str | None = None
    prompt: Text | None = None
    messages: Messages | None = None

    @model_validator(mode="after")
    def _one_of_the_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(_Strict):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId] = Field(max_length=200_000)
