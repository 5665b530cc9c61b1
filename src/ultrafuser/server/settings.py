"""Every limit and deadline of the server in one place; the defaults are the documented ones (`docs/serve.md`)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


class Limits(BaseModel):
    """What a request may be. More is refused with a 4xx."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    body_bytes: PositiveInt = 2 * 2**20
    header_bytes: PositiveInt = 16 * 2**10
    num_headers: PositiveInt = 100
    url_bytes: PositiveInt = 8 * 2**10
    max_tokens: PositiveInt | None = None  # of one answer; None: as many as the context holds
    num_prompts: PositiveInt = 256  # in one request to /v1/completions
    num_choices: PositiveInt = 512  # prompts times n
    num_connections: PositiveInt = 1000  # fewer where the process may not open as many files
    requests_per_minute: NonNegativeInt = 0  # of one key; 0: any number
    requests_at_once: NonNegativeInt = 0  # of one key; 0: any number


class Deadlines(BaseModel):
    """How long the server waits, in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    read_s: PositiveFloat = 15.0  # for the head of a request, and again for its body
    write_s: PositiveFloat = 30.0  # for a client that does not read
    encode_s: PositiveFloat = 10.0  # for templates and tokenizer
    first_token_s: PositiveFloat = 120.0  # in the queue and until the first token
    next_token_s: PositiveFloat = 60.0  # between two tokens; longer is an engine that hangs
    total_s: PositiveFloat = 600.0  # for a whole answer
    drain_s: PositiveFloat = 20.0  # for what runs when the server is told to stop


class ServerSettings(BaseModel):
    """How one server behaves.

    Attributes:
        model_name: What requests must call the model.
        allowed_hosts: Values of the Host header, ports aside; "*" allows any. Any other is refused, so that a page of a
            stranger cannot reach a local server under its own name (DNS rebinding).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_name: str
    allowed_hosts: tuple[str, ...] = LOCAL_HOSTS
    limits: Limits = Limits()
    deadlines: Deadlines = Deadlines()
