"""Sampled tokens follow the fused distribution, with speculation and without: chi-square over many seeds.

A tiny vocabulary, so that every token is drawn often; the probabilities expected are those of the plain forward, cut by
transformers' own processors. Seeds are fixed, so a test passes always or never.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine_helpers import always_draft, make_engine, reference_fused, reference_outputs, run
from helpers import make_fused, make_model, make_tokenizer, reference_scores
from ultrafuser.engine.drafts import DraftKind
from ultrafuser.engine.requests import GenerationRequest
from ultrafuser.generation import SamplingParams

DRAWS = 640
CHOICES = 16  # of a request: its prompt is read once
PROMPTS = ((5, 6, 5, 6), (6, 5), (7, 5, 6))
LEAST = 5.0  # draws that a bin must expect
CASES: dict[str, tuple[dict[str, Any], list[Any], tuple[DraftKind, ...]]] = {
    "temperature, plain": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)], ()),
    "temperature, self": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)], ("self",)),
    "temperature, model": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)], ("model",)),
    "top-k, self": ({"temperature": 1.0, "top_k": 9}, [TopKLogitsWarper(9)], ("self",)),
    "top-p, model": (
        {"temperature": 0.8, "top_p": 0.7},
        [TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.7)],
        ("model",),
    ),
    "min-p, self": ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)], ("self",)),
}


@torch.no_grad()
def expected_probabilities(model: Any, response: list[int], warpers: list[Any]) -> Tensor:
    logits, hiddens = reference_outputs(model, [[*row, *response] for row in PROMPTS])
    weights = torch.softmax(reference_scores(model, [h[-1] for h in hiddens]), dim=-1)
    fused = reference_fused(model, [rows[-1] for rows in logits], weights)
    return LogitsProcessorList(warpers)(torch.zeros((1, 1), dtype=torch.long), fused[None])[0].softmax(dim=-1)


def chi_square_p(counts: Tensor, probabilities: Tensor) -> float:
    """Of these counts, where they were drawn with these probabilities; rare tokens are one bin."""
    assert float(counts[probabilities == 0].sum()) == 0, "a token was drawn that is impossible"
    total = float(counts.sum())
    expected = probabilities.double() * total
    often = expected >= LEAST
    observed = torch.cat([counts[often].double(), counts[~often].sum()[None].double()])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    kept = expected >= LEAST
    statistic = float((((observed - expected) ** 2) / expected)[kept].sum())
    degrees = int(kept.sum()) - 1
    assert degrees >= 3, "too few bins to say anything"
    return float(torch.special.gammaincc(torch.tensor(degrees / 2.0).double(), torch.tensor(statistic / 2).double()))


def draw(model: Any, params: dict[str, Any], kinds: tuple[DraftKind, ...]) -> list[list[int]]:
    """Four tokens for each of many seeds."""
    draft = make_model(seed=0)
    engine = make_engine(model, draft=draft, drafts=kinds, max_choices=CHOICES, max_draft_choices=CHOICES)
    if kinds:
        always_draft(engine, *kinds, lengths=(2,))
    fixed: dict[str, Any] = {"max_tokens": 4, "n": CHOICES, "ignore_end": True, **params}
    requests = [GenerationRequest(PROMPTS, SamplingParams(seed=seed, **fixed)) for seed in range(DRAWS // CHOICES)]
    answers = [heard.ids(choice) for heard in run(engine, *requests) for choice in range(CHOICES)]
    if kinds:
        stats = engine.stats()
        assert 0 < stats.accepted_tokens < stats.drafted_tokens
    return answers


def test_the_chi_square_test_finds_a_wrong_distribution():
    probabilities = torch.full((10,), 0.1)
    fair = torch.full((10,), 100.0)
    assert chi_square_p(fair, probabilities) > 0.99
    fair[0], fair[1] = 140.0, 60.0
    assert chi_square_p(fair, probabilities) < 1e-3


@pytest.mark.parametrize(("params", "warpers", "kinds"), CASES.values(), ids=CASES.keys())
def test_sampled_tokens_follow_the_fused_distribution(
    params: dict[str, Any], warpers: list[Any], kinds: tuple[DraftKind, ...]
):
    model = make_fused()
    answers = draw(model, params, kinds)
    vocab = len(make_tokenizer())

    first = torch.bincount(torch.tensor([ids[0] for ids in answers]), minlength=vocab)
    assert chi_square_p(first, expected_probabilities(model, [], warpers)) > 1e-3

    # The second token is the first that a draft may have guessed: given the most frequent first one, and over all.
    given, _ = Counter(ids[0] for ids in answers).most_common(1)[0]
    second = torch.bincount(torch.tensor([ids[1] for ids in answers if ids[0] == given]), minlength=vocab)
    assert chi_square_p(second, expected_probabilities(model, [given], warpers)) > 1e-3

    mixture = torch.zeros(vocab)
    for token, count in Counter(ids[0] for ids in answers).items():
        mixture += count / len(answers) * expected_probabilities(model, [token], warpers)
    everything = torch.bincount(torch.tensor([ids[1] for ids in answers]), minlength=vocab)
    assert chi_square_p(everything, mixture) > 1e-3
