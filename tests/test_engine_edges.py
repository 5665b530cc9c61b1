"""Corners of the engine: choices cancelled one by one, drafters that lag or do not fit, saving beside an engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine_helpers import Heard, always_draft, assert_answers, finish, greedy, make_engine, make_similar, run, twin
from helpers import make_fused, make_mixed, make_model, make_tokenizer, make_trio
from ultrafuser.engine.drafts import PLAIN
from ultrafuser.errors import ModelError
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.fused import FusedForCausalLM


def test_one_choice_of_a_request_can_be_cancelled_alone_while_the_prompt_is_read():
    engine = make_engine(make_fused(), chunk=4)
    heard = Heard(3)
    choices = engine.add(greedy(20, 9, 5, n=3, ignore_end=True), heard)
    engine.step()

    choices[1].cancelled = True
    finish(engine)

    assert heard.reasons == ["length", "cancelled", "length"]
    assert heard.ids(0) == heard.ids(2) != heard.ids(1) == []
    assert not engine._memory


@pytest.mark.parametrize("more", [{"weights": {"code": 1.0}}, {"without": ("math",)}], ids=str)
def test_solo_answers_alone_whatever_a_request_names(more: dict[str, Any]):
    model = make_fused(make_mixed(), solo="math")
    request = greedy(6, 9, 3, max_tokens=3)

    (heard,) = run(make_engine(model), replace(request, **more))

    assert_answers(model, request, heard)


@pytest.mark.parametrize("size", [200, 300])
def test_a_draft_model_of_another_vocabulary_is_refused(size: int):
    with pytest.raises(ModelError, match=f"the draft model has {size} tokens and the specialists 262"):
        make_engine(make_fused(), draft=make_model(vocab_size=size), drafts=("model",))


def test_a_draft_model_that_lags_catches_up_beside_a_choice_at_the_end_of_its_context():
    model = make_fused(make_similar())
    engine = make_engine(model, draft=make_model(seed=0), drafts=("model",), max_context=64, chunk=64)
    early = greedy(4, 4, 4, seed=2, max_tokens=55, ignore_end=True)
    late = greedy(50, 4, 4, seed=1, max_tokens=100, ignore_end=True)
    heard = [Heard(), Heard()]
    engine.planner.plan = lambda *_: PLAIN  # type: ignore[method-assign]
    engine.add(early, heard[0])
    for _ in range(30):
        engine.step()
    engine.add(late, heard[1])
    for _ in range(9):
        engine.step()

    always_draft(engine, "model", lengths=(2,))
    finish(engine)

    assert engine.stats().drafted_tokens > 0
    for request, one in zip((early, late), heard, strict=True):
        assert_answers(model, request, one, max_context=64)


def test_an_end_token_with_id_0_ends_answers():
    model = make_fused()
    model.generation_config.eos_token_id = 0
    engine = make_engine(model)

    (heard,) = run(engine, greedy(7, 9, 5, logit_bias=((0, 1000.0),)))

    assert (heard.ids(), heard.reasons) == ([], ["stop"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_an_engine_can_be_saved_and_loaded(tmp_path, tied: bool):
    model = make_fused(make_trio(tied=tied))
    before = twin(model)
    make_engine(model)

    save_fused(model, tmp_path / "fused", tokenizer=make_tokenizer())
    model.specialists["text"].save_pretrained(tmp_path / "text")

    loaded = FusedForCausalLM.from_pretrained(str(tmp_path / "fused"))
    states = loaded.state_dict(), before.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "text").state_dict()
    assert all(torch.equal(alone[key], value) for key, value in before.specialists["text"].state_dict().items())
