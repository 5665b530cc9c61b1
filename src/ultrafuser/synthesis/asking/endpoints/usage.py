"""Tokens and money of a request: what it will take, the most it can take, and whether what an endpoint says can be.

There is no tokenizer of the endpoint's model here, so bounds come from bytes: no token is shorter than one byte, and
none of the vocabularies in use has one longer than 128 (cl100k's longest run of spaces).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from ultrafuser.synthesis.node import FinishReason, Request
from ultrafuser.synthesis.parsing import SCHEMAS
from ultrafuser.synthesis.recipe import EndpointConfig

BYTES_PER_TOKEN = 4.2  # of English prose and code in vocabularies of 32k to 200k; measured means replace it
LONGEST_TOKEN_BYTES = 128
TOKENS_PER_MESSAGE = 16  # a chat template's own, at most
TOKENS_AROUND = 512  # a system message that the template or the provider adds, at most


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    is_estimated: bool = False


def estimate_tokens(text: str) -> int:
    """About how many tokens a text is."""
    return math.ceil(_num_bytes(text) / BYTES_PER_TOKEN)


def likely_prompt_tokens(request: Request) -> int:
    """About how many tokens an endpoint will read."""
    return sum(map(estimate_tokens, _texts(request))) + 4 * len(request.messages)


def most_prompt_tokens(request: Request) -> int:
    """More than an endpoint can read for this request, its schema and its chat template included."""
    schema = len(json.dumps(SCHEMAS.get(request.answer, {}))) if request.answer is not None else 0
    own = sum(map(_num_bytes, _texts(request)))
    return own + schema + TOKENS_PER_MESSAGE * len(request.messages) + TOKENS_AROUND


def cost(config: EndpointConfig, prompt_tokens: int, completion_tokens: int, *, is_batch: bool = False) -> float:
    """Money for these tokens."""
    price = (prompt_tokens * config.price.input + completion_tokens * config.price.output) / 1e6
    return price * (config.batch_price_factor if is_batch else 1.0)


def check_usage(said: Any, request: Request, text: str, finish_reason: FinishReason) -> Usage:
    """The usage an endpoint tells, or our estimate where it tells none or one that cannot be true.

    Args:
        said: The field `usage` of its answer, whatever that is.
    """
    said = said if isinstance(said, dict) else {}
    prompt, completion = _count(said.get("prompt_tokens")), _count(said.get("completion_tokens"))
    least_prompt = max(1, math.ceil(sum(map(_num_bytes, _texts(request))) / LONGEST_TOKEN_BYTES))
    least_completion = math.ceil(_num_bytes(text) / LONGEST_TOKEN_BYTES)
    prompt_is_possible = prompt is not None and least_prompt <= prompt <= most_prompt_tokens(request)
    completion_is_possible = completion is not None and least_completion <= completion <= request.max_tokens
    if prompt is not None and completion is not None and prompt_is_possible and completion_is_possible:
        return Usage(prompt, completion)
    written = request.max_tokens if finish_reason == "length" else min(estimate_tokens(text), request.max_tokens)
    return Usage(
        prompt if prompt is not None and prompt_is_possible else likely_prompt_tokens(request),
        completion if completion is not None and completion_is_possible else written,
        is_estimated=True,
    )


def _count(value: Any) -> int | None:
    """A number of tokens; None: it is no such number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if math.isfinite(value) and value == int(value) and value >= 0 else None


def _texts(request: Request) -> list[str]:
    return [m.content for m in request.messages] + ([request.prompt] if request.prompt is not None else [])


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
