"""Whether a request can ever be served, before anything is done for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ultrafuser.engine.requests import GenerationRequest
from ultrafuser.errors import RequestError
from ultrafuser.generation import SamplingParams


def check_request(request: GenerationRequest, *, names: Sequence[str], max_context: int, vocab_size: int) -> None:
    """Refuse what cannot be served.

    Args:
        request: The request.
        names: The specialists.
        max_context: Tokens of the longest view.
        vocab_size: V.

    Raises:
        RequestError: Says which value is wrong and what it may be.
    """
    if len(request.prompts) != len(names):
        raise RequestError(f"the request has {len(request.prompts)} prompts for {len(names)} specialists")
    _check_specialists(request, names)
    for name, row in zip(names, request.prompts, strict=True):
        if not row:
            raise RequestError(f"the prompt of specialist {name!r} is empty: there is nothing to go on from")
        if (worst := max(row)) >= vocab_size or min(row) < 0:
            raise RequestError(
                f"the prompt has token id {worst if worst >= vocab_size else min(row)}; ids end at {vocab_size - 1}"
            )
    longest = max(map(len, request.prompts))
    if longest >= max_context:
        raise RequestError(
            f"the prompt has {longest} tokens; with a context of {max_context} it may have {max_context - 1}"
        )
    if request.score_prompt and len(set(request.prompts)) > 1:
        raise RequestError("prompt scores need one text that all specialists read, without a chat template")
    check_params(request.params, vocab_size)


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Refuse sampling parameters out of range.

    Raises:
        RequestError: Says which, and its range.
    """
    ranges: list[tuple[str, int | float, int | float, int | float]] = [
        ("max_tokens", params.max_tokens, 1, math.inf),
        ("temperature", params.temperature, 0.0, 100.0),
        ("top_p", params.top_p, 1e-9, 1.0),
        ("top_k", params.top_k, 0, math.inf),
        ("min_p", params.min_p, 0.0, 1.0),
        ("presence_penalty", params.presence_penalty, -2.0, 2.0),
        ("frequency_penalty", params.frequency_penalty, -2.0, 2.0),
        ("repetition_penalty", params.repetition_penalty, 1e-2, 100.0),
        ("min_tokens", params.min_tokens, 0, params.max_tokens),
        ("log_probs", params.log_probs or 0, 0, vocab_size),
        ("n", params.n, 1, math.inf),
    ]
    for name, value, low, high in ranges:
        if not low <= value <= high:  # false for NaN, too
            raise RequestError(f"{name} is {value}; it must be {_range(low, high)}")
    if any(not stop for stop in params.stop):
        raise RequestError("a stop string is empty")
    for token, bias in params.logit_bias:
        if not math.isfinite(bias):
            raise RequestError(f"the logit bias of token {token} is {bias}; it must be finite")
    for token in (*params.stop_token_ids, *(token for token, _ in params.logit_bias)):
        if not 0 <= token < vocab_size:
            raise RequestError(f"there is no token {token}; ids go from 0 to {vocab_size - 1}")


def _check_specialists(request: GenerationRequest, names: Sequence[str]) -> None:
    named = {*request.without, *(request.weights or {})}
    if unknown := sorted(named - set(names)):
        raise RequestError(f"there is no specialist {unknown[0]!r}; the model has {', '.join(names)}")
    if set(names) <= set(request.without):
        raise RequestError("every specialist is left out: keep at least one")
    if request.weights is None:
        return
    values = {name: weight for name, weight in request.weights.items() if name not in request.without}
    for name, weight in request.weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise RequestError(f"the weight of {name!r} is {weight}; it must be a number of at least 0")
    if not sum(values.values()) > 0:
        raise RequestError("all weights are 0: give at least one specialist a weight")


def _range(low: int | float, high: int | float) -> str:
    return f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
