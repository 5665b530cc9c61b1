"""The engine as a Generator: what FusedGenerator answers, from any number of conversations at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine_helpers import make_engine, make_similar, twin
from helpers import make_fused, make_mixed, make_model, make_tokenizer
from ultrafuser.chat.messages import Message
from ultrafuser.engine.generator import EngineGenerator
from ultrafuser.engine.load import load_engine
from ultrafuser.engine.options import EngineOptions
from ultrafuser.errors import ModelError, RequestError
from ultrafuser.generation import SamplingParams
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.model.load import LoadOptions

QUESTIONS = [
    (Message("user", "hi"),),
    (Message("user", "hi"), Message("assistant", "Hello."), Message("user", "What is 2 + 2?")),
    (Message("user", "Write a function that adds."),),
]


def both(model: Any = None, **options: Any) -> tuple[EngineGenerator, FusedGenerator]:
    model = make_fused(make_mixed()) if model is None else model
    other = FusedGenerator(twin(model), make_tokenizer())
    defaults = {"max_context": 256, "max_choices": 2}
    return EngineGenerator(make_engine(model, **{**defaults, **options})), other


@pytest.mark.parametrize("stop", [(), ("e",)], ids=str)
@pytest.mark.parametrize("drafts", [(), ("lookup", "self")], ids=str)
def test_conversations_get_the_answers_of_the_fused_generator(drafts: tuple[Any, ...], stop: tuple[str, ...]):
    engine, other = both(drafts=drafts)
    params = SamplingParams(max_tokens=10, stop=stop)

    actual, expected = engine.generate(QUESTIONS, params), other.generate(QUESTIONS, params)

    assert engine.names == other.names
    for a, b in zip(actual, expected, strict=True):
        assert (a.text, a.token_ids, a.finish_reason) == (b.text, b.token_ids, b.finish_reason)
        torch.testing.assert_close(torch.tensor(a.gate_weights), torch.tensor(b.gate_weights), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"weighting": "perplexity"}, {"granularity": "prompt"}, {"solo": "math"}], ids=str)
def test_other_weights_are_those_of_the_fused_generator(options: dict[str, Any]):
    engine, other = both(make_fused(make_similar(), **options))
    params = SamplingParams(max_tokens=8)

    actual, expected = engine.generate(QUESTIONS, params), other.generate(QUESTIONS, params)

    for a, b in zip(actual, expected, strict=True):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(torch.tensor(a.gate_weights), torch.tensor(b.gate_weights), rtol=1e-3, atol=1e-4)


def test_plain_text_is_continued_and_answers_are_scored_as_by_the_fused_generator():
    engine, other = both()
    prompts, params = [(5, 6, 7), (9,)], SamplingParams(max_tokens=6)
    answered = [(*question, Message("assistant", "yes")) for question in QUESTIONS]

    assert [c.token_ids for c in engine.complete(prompts, params)] == [
        c.token_ids for c in other.complete(prompts, params)
    ]
    for a, b in zip(engine.score(answered), other.score(answered), strict=True):
        torch.testing.assert_close(torch.tensor(a.log_probs), torch.tensor(b.log_probs), rtol=1e-3, atol=1e-4)


def test_choices_of_each_conversation_follow_one_another():
    engine, _ = both()
    one = SamplingParams(max_tokens=5, temperature=2.0, seed=1, n=2)

    completions = engine.generate(QUESTIONS[:2], one)

    assert len(completions) == 4
    assert completions[:2] == engine.generate(QUESTIONS[:1], one)
    assert completions[0] != completions[1]


def test_after_an_error_the_generator_answers_as_before():
    engine, _ = both()
    params = SamplingParams(max_tokens=6, n=2)
    before = engine.generate(QUESTIONS, params)
    fused: Any = engine.engine.runner.fused
    engine.engine.runner.fused = lambda *args: fused(*args) * torch.nan  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"no numbers \(NaN\)"):
        engine.generate(QUESTIONS, params)
    engine.engine.runner.fused = fused  # type: ignore[method-assign]

    assert not engine.engine.has_work
    assert engine.generate(QUESTIONS, params) == before


def test_a_prompt_that_is_too_long_is_refused_and_leaves_nothing_behind():
    engine, _ = both()
    with pytest.raises(RequestError, match="the prompt has 300 tokens"):
        engine.complete([(5, 6), (5,) * 300], SamplingParams(max_tokens=4))
    assert not engine.engine.has_work


def test_an_engine_is_loaded_from_a_fused_model_and_from_a_lone_one(tmp_path):
    model, tokenizer = make_fused(make_mixed()), make_tokenizer()
    save_fused(model, tmp_path / "fused", tokenizer=tokenizer)
    alone = make_model()
    alone.save_pretrained(tmp_path / "alone")
    tokenizer.save_pretrained(tmp_path / "alone")
    options, params = EngineOptions(max_context=256, max_choices=2), SamplingParams(max_tokens=6)

    fused = EngineGenerator(load_engine(str(tmp_path / "fused"), options))
    single = EngineGenerator(load_engine(str(tmp_path / "alone"), options, LoadOptions(template="plain")))

    expected = FusedGenerator(model, tokenizer).generate(QUESTIONS, params)
    assert [c.token_ids for c in fused.generate(QUESTIONS, params)] == [c.token_ids for c in expected]
    (completion,) = single.complete([(5, 6, 7)], params)
    written = alone.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    assert list(completion.token_ids) == [token for token in written if token != 2]
    assert set(completion.gate_weights) == {(1.0,)}


def test_a_place_without_a_model_is_one_clear_line(tmp_path):
    with pytest.raises(ModelError) as caught:
        load_engine(str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)
