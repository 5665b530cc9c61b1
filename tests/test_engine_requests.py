"""What a request may ask: nonsense is refused in one line, and weights and specialists are those it names."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine_helpers import greedy, make_engine, make_similar, reference_fused, reference_outputs, run
from helpers import VOCAB_SIZE, make_fused, make_mixed, make_trio
from ultrafuser.engine.check import check_request
from ultrafuser.engine.requests import GenerationRequest
from ultrafuser.errors import ModelError, RequestError
from ultrafuser.generation import SamplingParams

NAMES = ("text", "code", "math")
GOOD = greedy(3, 4, 5)


def check(request: GenerationRequest) -> None:
    check_request(request, names=NAMES, max_context=32, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ((5,), (5,))}, "the request has 2 prompts for 3 specialists"),
        ({"prompts": ((5,), (), (5,))}, "the prompt of specialist 'code' is empty"),
        ({"prompts": ((5,), (5, 262), (5,))}, "the prompt has token id 262; ids end at 261"),
        ({"prompts": ((5,), (5, -1), (5,))}, "the prompt has token id -1; ids end at 261"),
        ({"prompts": ((5,), (5,) * 32, (5,))}, "the prompt has 32 tokens; with a context of 32 it may have 31"),
        ({"score_prompt": True}, "prompt scores need one text that all specialists read"),
        ({"without": ("chess",)}, "there is no specialist 'chess'; the model has text, code, math"),
        ({"weights": {"chess": 1.0}}, "there is no specialist 'chess'; the model has text, code, math"),
        ({"without": NAMES}, "every specialist is left out: keep at least one"),
        ({"weights": {"code": -0.5, "text": 1.0}}, "the weight of 'code' is -0.5; it must be a number of at least 0"),
        ({"weights": {"code": math.nan}}, "the weight of 'code' is nan"),
        ({"weights": {"code": math.inf}}, "the weight of 'code' is inf"),
        ({"weights": {"code": 0.0}}, "all weights are 0: give at least one specialist a weight"),
        ({"weights": {}}, "all weights are 0"),
        ({"weights": {"code": 1.0}, "without": ("code",)}, "all weights are 0"),
    ],
    ids=str,
)
def test_a_request_that_can_never_be_served_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(RequestError) as caught:
        check(replace(GOOD, **changes))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be from 0 to 100"),
        ({"temperature": math.nan}, "temperature is nan; it must be from 0 to 100"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be from 1e-09 to 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1; it must be at least 0"),
        ({"min_p": 1.5}, "min_p is 1.5; it must be from 0 to 1"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1; it must be from -2 to 2"),
        ({"frequency_penalty": -2.1}, "frequency_penalty is -2.1; it must be from -2 to 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be from 0.01 to 100"),
        ({"min_tokens": 11}, "min_tokens is 11; it must be from 0 to 10"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"log_probs": -1}, "log_probs is -1; it must be from 0 to 262"),
        ({"log_probs": 263}, "log_probs is 263"),
        ({"n": 0}, "n is 0; it must be at least 1"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"stop_token_ids": (262,)}, "there is no token 262; ids go from 0 to 261"),
        ({"logit_bias": ((-1, 1.0),)}, "there is no token -1; ids go from 0 to 261"),
        ({"logit_bias": ((4, math.inf),)}, "the logit bias of token 4 is inf; it must be finite"),
    ],
    ids=str,
)
def test_a_parameter_out_of_range_is_refused_with_its_range(params: dict[str, Any], message: str):
    with pytest.raises(RequestError) as caught:
        check(replace(GOOD, params=SamplingParams(**{"max_tokens": 10, **params})))
    assert str(caught.value).startswith(message)


def test_what_lies_at_the_edges_is_taken():
    check(replace(GOOD, prompts=((261,), (0,) * 31, (5,))))
    check(replace(GOOD, without=("text", "math"), weights={"text": 5.0, "code": 1e-6}))
    edges = {"temperature": 100.0, "top_p": 1e-9, "min_p": 1.0, "min_tokens": 10, "log_probs": 262, "max_tokens": 10}
    check(replace(GOOD, params=SamplingParams(presence_penalty=-2.0, frequency_penalty=2.0, **edges)))


def test_more_choices_than_slots_are_refused_and_nothing_is_left_behind():
    engine = make_engine(max_choices=2)
    with pytest.raises(RequestError, match="n is 3; this engine can run 2 choices at once"):
        engine.add(greedy(3, 4, 5, n=3), print)
    assert not engine.has_work


def test_a_model_without_templates_is_refused():
    with pytest.raises(ModelError, match="has no templates"):
        make_engine(make_fused(templates=None))


# Weights of a request


@torch.no_grad()
@pytest.mark.parametrize("runner", ["sequential", "stacked"])
@pytest.mark.parametrize("space", ["logits", "probs"])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"weights": {"text": 1.0, "code": 3.0}}, [0.25, 0.75, 0.0]),
        ({"weights": {"math": 7.0}}, [0.0, 0.0, 1.0]),
        ({"weights": {"text": 2.0, "code": 1.0, "math": 1.0}, "without": ("code",)}, [2 / 3, 0.0, 1 / 3]),
        ({"weights": {"text": 1e-3, "code": 1e-3}}, [0.5, 0.5, 0.0]),
    ],
    ids=str,
)
def test_fixed_weights_are_scaled_to_one_and_make_the_distribution(
    runner: str, space: str, fields: dict[str, Any], expected: list[float]
):
    model = make_fused(make_similar(), fusion_space=space)
    request = greedy(6, 9, 3, max_tokens=3, log_probs=5, **fields)

    (heard,) = run(make_engine(model, runner=runner), request)

    for i, piece in enumerate(heard.pieces[0]):
        assert piece.gate_weights == pytest.approx(expected)
        logits, _ = reference_outputs(model, [[*row, *heard.ids()[:i]] for row in request.prompts])
        fused = reference_fused(model, [rows[-1] for rows in logits], torch.tensor(expected)).log_softmax(dim=-1)
        for token, log_prob in piece.top:
            assert log_prob == pytest.approx(float(fused[token]), abs=1e-3)


def test_without_a_specialist_the_gate_weighs_the_others_as_before_among_themselves():
    model = make_fused(make_trio())
    engine = make_engine(model)
    (whole,) = run(engine, greedy(6, 9, 3, max_tokens=1))
    (left,) = run(engine, greedy(6, 9, 3, max_tokens=1, without=("code",)))

    text, code, math_ = whole.pieces[0][0].gate_weights
    assert left.pieces[0][0].gate_weights == pytest.approx((text / (1 - code), 0.0, math_ / (1 - code)), abs=1e-5)


@pytest.mark.parametrize(
    "fields", [{"without": ("code",)}, {"weights": {"text": 1.0, "math": 0.5}}, {"weights": {"code": 0.0, "math": 1.0}}]
)
def test_a_specialist_that_is_left_out_or_weighs_nothing_does_not_run(fields: dict[str, Any]):
    model = make_fused(make_mixed())
    engine = make_engine(model, runner="sequential", drafts=("self",), static_shapes=False)
    calls = dict.fromkeys(NAMES, 0)

    def counted(name: str, hidden: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return hidden(*args)

        return call

    for name, group in zip(NAMES, engine.runner.groups, strict=True):
        group.backbone.hidden = counted(name, group.backbone.hidden)  # type: ignore[method-assign]
    run(engine, greedy(6, 9, 3, max_tokens=6, **fields))

    runs = {name: count > 0 for name, count in calls.items()}
    left_out = {"code"} | ({"text"} if fields.get("weights", {}).get("code") == 0.0 else set())
    assert runs == {name: name not in left_out for name in NAMES}


def test_solo_runs_one_specialist():
    engine = make_engine(make_fused(make_mixed(), solo="math"))
    calls: list[int] = []
    for view, group in enumerate(engine.runner.groups):
        hidden = group.backbone.hidden
        group.backbone.hidden = lambda *args, v=view, h=hidden: (calls.append(v), h(*args))[1]  # type: ignore
    (heard,) = run(engine, greedy(6, 9, 3, max_tokens=3))

    assert set(calls) == {2}
    assert {piece.gate_weights for piece in heard.pieces[0]} == {(0.0, 0.0, 1.0)}
