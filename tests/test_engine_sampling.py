"""How tokens are chosen: the masks and penalties of transformers, one seed one answer, log-probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine_helpers import (
    always_draft,
    assert_answers,
    greedy,
    make_engine,
    make_similar,
    reference_answer,
    reference_fused,
    reference_outputs,
    reference_weights,
    run,
)
from helpers import make_fused, make_mixed, make_model
from ultrafuser.engine.requests import GenerationRequest
from ultrafuser.engine.sampling import Sampler
from ultrafuser.generation import SamplingParams

V = 400  # more than the nucleus takes without a sort
SEEDS_APART = 0x9E3779B97F4A7C15  # between the seeds of a request's choices
HOT = {"temperature": 1.3, "top_p": 0.97, "top_k": 60, "draw_seed": 11}
LETTERS = tuple((token, 30.0 + token % 3) for token in range(40, 48))  # a bias to few tokens: a lookup finds some


def sampler(**params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), choice=0, prompt=(3, 5, 7, 5), ends={2})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [0.2, 3.0])
@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 7}, [TopKLogitsWarper(7)]),
        ({"temperature": 1.0, "top_k": 1}, [TopKLogitsWarper(1)]),
        ({"temperature": 1.0, "top_k": 1000}, [TopKLogitsWarper(1000)]),
        ({"temperature": 1.0, "top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"temperature": 1.0, "top_p": 0.01}, [TopPLogitsWarper(0.01)]),
        ({"temperature": 1.0, "top_p": 0.999}, [TopPLogitsWarper(0.999)]),
        ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.7, "top_k": 20, "top_p": 0.7, "min_p": 0.05},
            [TemperatureLogitsWarper(1.7), TopKLogitsWarper(20), TopPLogitsWarper(0.7), MinPLogitsWarper(0.05)],
        ),
    ],
    ids=lambda value: "-".join(type(warper).__name__ for warper in value) if isinstance(value, list) else str(value),
)
def test_cuts_keep_what_transformers_keeps(params: dict[str, Any], warpers: list[Any], scale: float, seed: int):
    logits = scale * torch.randn(V, generator=torch.Generator().manual_seed(seed))
    expected = LogitsProcessorList(warpers)(torch.zeros((1, 1), dtype=torch.long), logits[None])[0].softmax(dim=-1)

    actual = sampler(**params).probabilities(logits, ())

    torch.testing.assert_close(actual, expected)
    assert torch.equal(actual > 0, expected > 0)


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_the_repetition_penalty_is_that_of_transformers_over_prompt_and_response(penalty: float):
    logits = torch.randn(V)
    response = [9, 9, 3]
    ids = torch.tensor([[3, 5, 7, 5, *response]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None].clone())[0].softmax(dim=-1)

    actual = sampler(temperature=1.0, repetition_penalty=penalty).probabilities(logits, response)

    torch.testing.assert_close(actual, expected)


def test_presence_and_frequency_penalties_follow_the_formula_of_the_api():
    """`logit - count * frequency - (count > 0) * presence`, over the response alone."""
    logits = torch.randn(V)
    expected = logits.clone()
    expected[9] -= 2 * 0.7 + 0.4
    expected[3] -= 1 * 0.7 + 0.4

    actual = sampler(temperature=1.0, frequency_penalty=0.7, presence_penalty=0.4).probabilities(logits, [9, 3, 9])

    torch.testing.assert_close(actual, expected.softmax(dim=-1))


def test_a_bias_is_added_before_the_temperature():
    logits = torch.randn(V)
    expected = logits.clone()
    expected[4] += 2.5
    expected[8] -= 100.0

    actual = sampler(temperature=0.5, logit_bias=((4, 2.5), (8, -100.0))).probabilities(logits, ())

    torch.testing.assert_close(actual, (expected / 0.5).softmax(dim=-1))


def test_end_and_stop_tokens_are_impossible_before_min_tokens():
    choose = sampler(temperature=1.0, min_tokens=2, stop_token_ids=(17,))
    logits = torch.randn(V)
    for response, is_free in (((), False), ((5,), False), ((5, 6), True)):
        probabilities = choose.probabilities(logits, response)
        assert bool((probabilities[[2, 17]] > 0).all()) == is_free
        assert bool((probabilities[[2, 17]] == 0).all()) != is_free


def test_logits_are_left_as_they_were():
    logits = torch.randn(V)
    before = logits.clone()
    sampler(temperature=1.0, repetition_penalty=2.0, logit_bias=((1, 5.0),), presence_penalty=1.0).pick(logits, [4])
    assert torch.equal(logits, before)


def test_greedy_with_penalties_takes_the_largest_penalised_logit():
    logits = torch.zeros(V)
    logits[4], logits[6] = 2.0, 1.5
    assert sampler().pick(logits, [4]) == 4
    assert sampler(presence_penalty=1.0).pick(logits, [4]) == 6
    assert sampler(logit_bias=((6, 1.0),)).pick(logits, ()) == 6
    assert not sampler(logit_bias=((6, 1.0),)).takes_largest


def test_a_draw_depends_on_seed_choice_and_position_alone():
    logits = torch.randn(V)
    params = SamplingParams(temperature=2.0, seed=5)

    def draw(seed: int, choice: int, position: int) -> int:
        one = Sampler(replace(params, seed=seed), choice=choice, prompt=(1,), ends=())
        one.pick(logits, [1] * 3)  # what was drawn before does not matter
        return one.pick(logits, [9] * position)

    assert len({draw(5, 0, 4) for _ in range(3)}) == 1
    assert len({draw(seed, 0, 4) for seed in range(20)}) > 10
    assert len({draw(5, choice, 4) for choice in range(20)}) > 10
    assert len({draw(5, 0, position) for position in range(20)}) > 10


def test_without_a_seed_answers_differ():
    engine = make_engine()
    answers = run(engine, *[greedy(7, 9, 5, temperature=3.0, max_tokens=8)] * 4)
    assert len({tuple(heard.ids()) for heard in answers}) > 1


@pytest.mark.parametrize(
    "params",
    [
        HOT,
        {**HOT, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {**HOT, "min_p": 0.02, "stop_token_ids": (41,), "min_tokens": 8},
    ],
    ids=str,
)
def test_a_seed_gives_the_same_tokens_alone_in_a_batch_drafted_and_stacked(params: dict[str, Any]):
    model = make_fused(make_similar())
    asked = greedy(7, 15, 4, seed=1, max_tokens=24, logit_bias=LETTERS, **params)
    others = [greedy(3, 9, 20, seed=2, max_tokens=15), greedy(8, 2, 2, seed=3, max_tokens=9, temperature=2.0)]
    (alone,) = run(make_engine(model, runner="sequential"), asked)
    for runner in ("sequential", "stacked"):
        for kinds, form in (
            ((), "exact"),
            (("lookup",), "exact"),
            (("self",), "exact"),
            (("self",), "int4"),
            (("model",), "exact"),
        ):
            engine = make_engine(
                model,
                draft=make_model(seed=0),
                runner=runner,
                drafts=kinds,
                draft_weights=form,
                max_draft_choices=4,
            )
            if kinds:
                always_draft(engine, *kinds)
            heard = run(engine, others[0], asked, others[1])[1]
            assert heard.ids() == alone.ids()
            assert bool(engine.stats().drafted_tokens) == bool(kinds)
    assert len(set(alone.ids())) > 3


def test_sampled_tokens_are_those_that_the_sampler_draws_from_the_reference():
    model = make_fused(make_mixed())
    request = greedy(7, 15, 4, seed=1, max_tokens=12, repetition_penalty=1.1, **HOT)
    (heard,) = run(make_engine(model, drafts=("self", "lookup")), request)
    draw = Sampler(request.params, choice=0, prompt=max(request.prompts, key=len), ends={2})
    response: list[int] = []
    while len(response) < 12:
        logits, hiddens = reference_outputs(model, [[*row, *response] for row in request.prompts])
        weights = reference_weights(model, [h[-1] for h in hiddens], request)
        token = draw.pick(reference_fused(model, [rows[-1] for rows in logits], weights), response)
        if token == 2:
            break
        response.append(token)

    assert heard.ids() == response


def test_choices_differ_and_are_those_of_single_requests_with_the_seeds_of_the_choices():
    engine = make_engine()
    asked = greedy(7, 15, 4, seed=1, max_tokens=8, n=3, **HOT)

    (heard,) = run(engine, asked)

    alone = [
        run(engine, replace(asked, params=replace(asked.params, n=1, seed=(11 + k * SEEDS_APART) % 2**64)))[0]
        for k in range(3)
    ]
    assert [heard.ids(k) for k in range(3)] == [one.ids() for one in alone]
    assert [heard.text(k) for k in range(3)] == [one.text() for one in alone]
    assert len({tuple(heard.ids(k)) for k in range(3)}) == 3


def test_min_tokens_puts_off_the_end_and_max_tokens_makes_it():
    engine = make_engine()
    always_end = ((2, 1000.0),)

    early, late, never = run(
        engine,
        greedy(7, 9, 5, max_tokens=8, logit_bias=always_end),
        greedy(7, 9, 5, max_tokens=8, logit_bias=always_end, min_tokens=5),
        greedy(7, 9, 5, max_tokens=8, logit_bias=always_end, ignore_end=True),
    )

    assert [(len(h.ids()), h.reasons[0]) for h in (early, late, never)] == [(0, "stop"), (5, "stop"), (8, "length")]
    assert never.ids() == [2] * 8
    assert (early.text(), never.text()) == ("", "")


# Log-probabilities


@pytest.mark.parametrize("kinds", [(), ("self",), ("lookup",)], ids=str)
def test_log_probs_are_those_of_the_reference_before_temperature_and_penalties(kinds: tuple[Any, ...]):
    model = make_fused(make_similar())
    request = greedy(7, 15, 4, seed=1, log_probs=4, temperature=1e-4)
    expected = reference_answer(model, request)
    engine = make_engine(model, drafts=kinds)
    if kinds:
        always_draft(engine, *kinds)

    (heard,) = run(engine, request)

    assert heard.ids() == expected.ids
    for piece, logits in zip(heard.pieces[0], expected.logits, strict=True):
        log_probs = logits.log_softmax(dim=-1)
        values, ids = log_probs.topk(4)
        assert piece.log_prob == pytest.approx(float(log_probs[piece.token_id]), abs=1e-3)
        assert [token for token, _ in piece.top] == ids.tolist()
        torch.testing.assert_close(torch.tensor([value for _, value in piece.top]), values, rtol=1e-3, atol=1e-3)


def test_log_probs_come_only_where_asked_and_without_alternatives_where_zero_are_asked():
    engine = make_engine()
    none, zero = run(engine, greedy(7, 9, 5), greedy(7, 9, 5, log_probs=0))

    assert all(piece.log_prob is None and piece.top == () for piece in none.pieces[0])
    assert all(piece.log_prob is not None and piece.top == () for piece in zero.pieces[0])
    assert none.ids() == zero.ids()


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize(
    "more", [{}, {"without": ("code",)}, {"weights": {"math": 1.0, "code": 3.0}}], ids=["all", "without", "weights"]
)
def test_prompt_scores_are_the_references_whatever_the_chunks(chunk: int, more: dict[str, Any]):
    model = make_fused(make_mixed())
    row = greedy(14, seed=4).prompts[0]
    request = GenerationRequest((row,) * 3, SamplingParams(max_tokens=4, log_probs=2), score_prompt=True, **more)
    logits, hiddens = reference_outputs(model, request.prompts)

    (heard,) = run(make_engine(model, chunk=chunk), request)

    assert [piece.token_id for piece in heard.prompt] == list(row)
    assert (heard.prompt[0].log_prob, heard.prompt[0].top) == (None, ())
    for i, piece in enumerate(heard.prompt[1:]):
        weights = reference_weights(model, [h[i] for h in hiddens], request)
        expected = reference_fused(model, [rows[i] for rows in logits], weights).log_softmax(dim=-1)
        assert piece.log_prob == pytest.approx(float(expected[piece.token_id]), abs=1e-3)
        assert [token for token, _ in piece.top] == expected.topk(2).indices.tolist()
    assert "".join(piece.text for piece in heard.prompt) == make_engine(model).tokenizer.decode(row)
    assert_answers(model, request, heard)


def test_choices_of_a_scored_prompt_go_on_from_it_alike():
    row = tuple(make_engine().tokenizer("caf\u00e9", add_special_tokens=False)["input_ids"])[:-1]  # half a character
    request = GenerationRequest((row,) * 3, SamplingParams(max_tokens=6, n=2), score_prompt=True)

    (heard,) = run(make_engine(), request)

    assert heard.ids(0) == heard.ids(1)
    assert heard.text(0) == heard.text(1)
