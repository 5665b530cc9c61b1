"""Engine modes that must not change a token (constant shapes, graphs), and those that may and say how often."""

import subprocess
import sys
from pathlib import Path

import pytest

from helpers import make_fused, make_model, make_tokenizer
from ultrafuser.chat.messages import Message
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.generator import EngineGenerator
from ultrafuser.engine.options import EngineOptions
from ultrafuser.engine.requests import GenerationRequest
from ultrafuser.generation import Completion, SamplingParams
from ultrafuser.model.generator import FusedGenerator

CONVERSATIONS = [(Message("user", text),) for text in ("hi", "abcabcabcabc", "x" * 40)]
PARAMS = SamplingParams(max_tokens=30)


@pytest.fixture(scope="module")
def model():
    return make_fused()


@pytest.fixture(scope="module")
def expected(model) -> list[Completion]:
    return FusedGenerator(model, make_tokenizer()).generate(CONVERSATIONS, PARAMS)


def make_engine(model, **options) -> Engine:
    return Engine(model, make_tokenizer(), EngineOptions(**{"max_context": 256, "chunk": 16, **options}))


@pytest.mark.parametrize("runner", ["stacked", "sequential"])
@pytest.mark.parametrize("drafts", [(), ("lookup", "self")])
def test_steps_of_constant_shape_change_no_token(model, expected, runner, drafts):
    engine = make_engine(model, runner=runner, drafts=drafts, static_shapes=True, max_draft_choices=8)

    answers = EngineGenerator(engine).generate(CONVERSATIONS, PARAMS)

    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert engine.runner.groups[0].graphs is not None


@pytest.mark.slow
def test_a_step_is_captured_whole_and_once_for_each_shape():
    """In a process of its own: the type checks of this one cannot be compiled."""
    script = Path(__file__).with_name("compile_engine_step.py")

    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)

    words = result.stdout.split()
    assert words[:2] == ["equal", "True"], result.stderr
    assert words[3] == words[5] == "1"


def test_choices_that_are_not_there_write_where_nobody_reads(model, expected):
    """Three choices run as four rows: the fourth slot belongs to a prompt that is being read meanwhile."""
    engine = make_engine(model, runner="stacked", drafts=(), static_shapes=True, chunk=4)
    texts: dict[int, str] = {}
    for number, conversation in enumerate([*CONVERSATIONS, CONVERSATIONS[2]]):
        rows = engine.encoder.encode_prompt(conversation)
        texts[number] = ""

        def listen(event, number=number):
            texts[number] += "".join(piece.text for piece in event.pieces)

        engine.add(GenerationRequest(rows, PARAMS), listen)
    while engine.step():
        pass

    assert list(texts.values()) == [*(answer.text for answer in expected), expected[2].text]


def test_leaving_out_light_specialists_saves_passes_and_says_how_often_it_changed_nothing(model):
    engine = make_engine(model, skip_below=0.4, runner="sequential")

    EngineGenerator(engine).generate(CONVERSATIONS, SamplingParams(max_tokens=60))
    stats = engine.stats()

    assert stats.skipped_passes > 0
    assert stats.drafted_tokens == 0
    assert stats.audited_tokens > 0
    assert 0 <= stats.agreed_tokens <= stats.audited_tokens


def test_it_agrees_always_where_the_specialists_are_the_same():
    """Then nobody is missed, whoever is left out."""
    same = {name: make_model(seed=0) for name in ("text", "code", "math")}
    model = make_fused(same, templates=("plain",) * 3)
    engine = make_engine(model, skip_below=0.5)
    reference = FusedGenerator(model, make_tokenizer()).generate(CONVERSATIONS, PARAMS)

    answers = EngineGenerator(engine).generate(CONVERSATIONS, PARAMS)
    stats = engine.stats()

    assert [a.token_ids for a in answers] == [a.token_ids for a in reference]
    assert stats.skipped_passes > 0
    assert stats.agreed_tokens == stats.audited_tokens > 0


def test_nobody_is_left_out_unless_asked(model, expected):
    engine = make_engine(model, drafts=())

    answers = EngineGenerator(engine).generate(CONVERSATIONS, PARAMS)

    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert engine.stats().skipped_passes == 0


@pytest.mark.parametrize("drafts", [(), ("self",)], ids=str)
@pytest.mark.parametrize("weights", ["half", "int8"])
def test_released_weights_are_given_back_and_answers_stay(weights, drafts):
    kept = make_engine(make_fused(), weights=weights, drafts=drafts)
    released = make_engine(model := make_fused(), weights=weights, release_model=True, drafts=drafts)

    answers = [EngineGenerator(engine).generate(CONVERSATIONS, PARAMS) for engine in (kept, released)]

    assert [a.token_ids for a in answers[0]] == [a.token_ids for a in answers[1]]
    assert released.runner.released
    assert not kept.runner.released
    layer = model.specialists["text"].base_model.layers[0]
    assert layer.mlp.up_proj.weight.numel() == 0
    assert model.specialists["text"].get_input_embeddings().weight.numel() > 0


@pytest.mark.parametrize("pack", [False, True])
def test_weights_that_the_engine_shares_are_not_released(pack):
    engine = make_engine(model := make_fused(), pack=pack, release_model=True, drafts=())

    answers = EngineGenerator(engine).generate(CONVERSATIONS, PARAMS)

    assert not engine.runner.released
    assert [a.token_ids for a in answers] == [
        a.token_ids for a in FusedGenerator(model, make_tokenizer()).generate(CONVERSATIONS, PARAMS)
    ]
