"""Greedy answers of the engine are those of the plain uncached loop: tokens, text, weights, reasons."""

from __future__ import annotations

from typing import Any

import pytest

from engine_helpers import (
    CONTEXT,
    ON_CPU,
    Heard,
    always_draft,
    assert_answers,
    finish,
    greedy,
    make_engine,
    make_similar,
    run,
    twin,
)
from helpers import make_fused, make_mixed, make_model, make_trio
from ultrafuser.engine.llama import LlamaStack
from ultrafuser.engine.runner import MARGIN

MIX = (
    greedy(7, 21, 12, seed=1, max_tokens=14),
    greedy(30, 5, 9, seed=2, max_tokens=6),
    greedy(2, 3, 1, seed=3, max_tokens=20),
    greedy(40, 44, 50, seed=4, max_tokens=3),
    greedy(11, 11, 11, seed=5, max_tokens=9),
    greedy(1, 1, 1, seed=6, max_tokens=1),
)
KINDS = {
    "none": (),
    "lookup": ("lookup",),
    "self": ("self",),
    "model": ("model",),
    "all": ("lookup", "self", "model"),
}


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("specialists", [make_trio, make_mixed])
def test_an_answer_alone_is_the_plain_loops(specialists, chunk: int):
    engine = make_engine(make_fused(specialists()), chunk=chunk)
    for request in MIX[:3]:
        (heard,) = run(engine, request)
        assert_answers(engine.model, request, heard)


@pytest.mark.parametrize("runner", ["sequential", "stacked"])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
def test_answers_in_a_mix_are_the_plain_loops_with_and_without_drafts(runner: str, kinds: tuple[Any, ...]):
    model = make_fused(make_similar())
    reference = twin(model)
    engine = make_engine(
        model, draft=make_model(seed=9), runner=runner, drafts=kinds, max_draft_choices=4, chunk=3, max_choices=3
    )
    if kinds:
        always_draft(engine, *kinds)

    for request, heard in zip(MIX, run(engine, *MIX), strict=True):
        assert_answers(reference, request, heard)

    stats = engine.stats()
    assert (stats.drafted_tokens > 0) == bool(kinds)
    if "self" in kinds:
        assert stats.accepted_tokens > 0
    assert 0 <= stats.accepted_tokens <= stats.drafted_tokens


@ON_CPU
@pytest.mark.parametrize("runner", ["sequential", "stacked"])
@pytest.mark.parametrize("form", ["half", "int4"])
def test_a_specialist_that_runs_ahead_in_fewer_bits_changes_no_answer(runner: str, form: str):
    model = make_fused(make_similar())
    reference = twin(model)
    engine = make_engine(
        model, runner=runner, drafts=("self",), draft_weights=form, max_draft_choices=4, chunk=3, max_choices=3
    )
    always_draft(engine, "self")

    for request, heard in zip(MIX, run(engine, *MIX), strict=True):
        assert_answers(reference, request, heard)

    stats = engine.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


@ON_CPU
def test_nothing_that_a_wrong_drafter_leaves_in_the_caches_is_ever_seen():
    """Whole blocks of keys and values are another model's here, and are written over before anybody reads them."""
    model = make_fused(make_similar())
    reference = twin(model)
    engine = make_engine(model, runner="stacked", drafts=("self",), draft_weights="half", max_draft_choices=4)
    strangers = [make_model(seed=seed) for seed in (7, 8, 9)]
    engine.runner.groups[0].drafter = LlamaStack(strangers, length=CONTEXT + MARGIN)
    always_draft(engine, "self")

    for request, heard in zip(MIX, run(engine, *MIX), strict=True):
        assert_answers(reference, request, heard)

    stats = engine.stats()
    assert stats.accepted_tokens < 0.2 * stats.drafted_tokens


@pytest.mark.parametrize("kind", ["lookup", "self", "model"])
def test_drafts_change_no_answer_of_different_architectures(kind: Any):
    model = make_fused(make_mixed())
    engine = make_engine(model, draft=make_model(seed=9), drafts=(kind,), max_draft_choices=4)
    always_draft(engine, kind)

    for request, heard in zip(MIX, run(engine, *MIX), strict=True):
        assert_answers(model, request, heard)
    assert engine.stats().drafted_tokens > 0


def test_the_planner_left_to_itself_changes_no_answer():
    model = make_fused(make_similar())
    engine = make_engine(model, draft=make_model(seed=0), drafts=("lookup", "self", "model"), max_draft_choices=2)
    requests = [greedy(9, 12, 4, seed=seed, max_tokens=40) for seed in range(3)]

    for request, heard in zip(requests, run(engine, *requests), strict=True):
        assert_answers(model, request, heard)


def test_a_draft_model_that_is_the_specialist_is_always_right():
    model = make_fused({"text": make_model(seed=4)})
    engine = make_engine(model, draft=make_model(seed=4), drafts=("model",))
    always_draft(engine, "model")

    (heard,) = run(engine, request := greedy(9, max_tokens=30))

    assert_answers(model, request, heard)
    stats = engine.stats()
    assert stats.accepted_tokens == stats.drafted_tokens > 0
    assert stats.steps < 30


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("kind", ["lookup", "self", "model"])
def test_one_or_two_specialists_answer_as_the_plain_loop(num: int, kind: Any):
    model = make_fused(make_similar(num))
    engine = make_engine(model, draft=make_model(seed=9), drafts=(kind,), max_draft_choices=4)
    always_draft(engine, *engine.planner.kinds or ("lookup",))
    requests = [greedy(*lengths[:num], seed=seed) for seed, lengths in enumerate([(5, 9), (20, 3), (1, 1)])]

    for request, heard in zip(requests, run(engine, *requests), strict=True):
        assert_answers(model, request, heard)


@ON_CPU
def test_one_specialist_is_drafted_for_by_itself_only_in_fewer_bits():
    kinds = ("lookup", "self", "model")
    exact = make_engine(make_fused(make_similar(1)), drafts=kinds, draft_weights="exact")
    reduced = make_engine(make_fused(make_similar(1)), drafts=kinds, draft_weights="half")
    assert exact.planner.kinds == ("lookup",)
    assert reduced.planner.kinds == ("lookup", "self")


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "prompt"},
        {"weighting": "uniform"},
        {"weighting": "perplexity"},
        {"weighting": "perplexity", "perplexity_temperature": 0.2},
        {"fusion_space": "logprobs"},
        {"fusion_space": "probs"},
        {"solo": "code"},
        {"granularity": "prompt", "fusion_space": "probs"},
    ],
    ids=str,
)
@pytest.mark.parametrize("specialists", [make_similar, make_mixed])
def test_other_ways_to_weigh_and_to_fuse_answer_as_the_plain_loop(specialists, options: dict[str, Any]):
    model = make_fused(specialists(), **options)
    engine = make_engine(model, drafts=("lookup", "self"), max_draft_choices=4, chunk=3)
    always_draft(engine, "self", "lookup")

    for request, heard in zip(MIX[:4], run(engine, *MIX[:4]), strict=True):
        assert_answers(model, request, heard)
    assert engine.stats().drafted_tokens > 0


def test_requests_that_join_while_others_decode_get_the_plain_loops_answers():
    engine = make_engine(make_fused(make_trio()), chunk=4, max_choices=3)
    heard = [Heard() for _ in MIX]

    def join(number: int) -> None:
        if number % 2 == 0 and number // 2 < len(MIX):
            engine.add(MIX[number // 2], heard[number // 2])

    finish(engine, join)
    while engine.step():
        pass

    for request, one in zip(MIX, heard, strict=True):
        assert_answers(engine.model, request, one)


@pytest.mark.parametrize("runner", ["sequential", "stacked"])
def test_choices_that_leave_out_or_weigh_specialists_share_a_batch(runner: str):
    model = make_fused(make_similar())
    engine = make_engine(model, runner=runner, drafts=("self", "lookup"), max_draft_choices=4)
    always_draft(engine, "self", "lookup")
    requests = [
        greedy(7, 9, 5, seed=1),
        greedy(7, 9, 5, seed=1, without=("text",)),
        greedy(7, 9, 5, seed=1, without=("text", "math")),
        greedy(7, 9, 5, seed=1, weights={"math": 2.0, "text": 1.0}),
    ]

    for request, heard in zip(requests, run(engine, *requests), strict=True):
        assert_answers(model, request, heard)


def test_the_context_is_a_limit_of_the_longest_view():
    model = make_fused()
    engine = make_engine(model, max_context=32, drafts=("lookup", "self"))
    always_draft(engine, "lookup", "self")
    requests = [greedy(20, 26, 3, max_tokens=100), greedy(31, 1, 1, seed=8, max_tokens=100)]

    answers = run(engine, *requests)

    assert [(len(heard.ids()), heard.reasons[0]) for heard in answers] == [(6, "length"), (1, "length")]
    for request, heard in zip(requests, answers, strict=True):
        assert_answers(model, request, heard, max_context=32)


def test_a_stop_token_or_end_token_ends_an_answer_and_is_no_part_of_it():
    model = make_fused()
    engine = make_engine(model)
    (plain,) = run(engine, greedy(7, 9, 5, seed=1))
    stop = plain.ids()[4]
    at = plain.ids().index(stop)

    (heard,) = run(engine, greedy(7, 9, 5, seed=1, stop_token_ids=(stop,)))

    assert (heard.ids(), heard.reasons) == (plain.ids()[:at], ["stop"])


def test_an_end_token_is_passed_over_only_where_asked():
    model = make_fused()
    ends = frozenset({run(make_engine(model), greedy(7, 9, 5, seed=1))[0].ids()[3]})
    model.generation_config.eos_token_id = list(ends)
    engine = make_engine(model)
    asked = [greedy(7, 9, 5, seed=1), greedy(7, 9, 5, seed=1, ignore_end=True)]

    stopped, went_on = run(engine, *asked)

    assert (stopped.reasons, went_on.reasons) == (["stop"], ["length"])
    assert went_on.ids()[: len(stopped.ids())] == stopped.ids()
    assert len(went_on.ids()) == 10
    assert_answers(model, asked[0], stopped, ends=engine.end_ids)


def test_choices_of_one_greedy_request_read_the_prompt_once_and_agree():
    model = make_fused(make_trio())
    engine = make_engine(model, chunk=5)
    request = greedy(7, 13, 5, seed=1, n=3)

    (heard,) = run(engine, request)

    assert_answers(model, request, heard)
    assert engine.stats().prompt_tokens == 13
    assert engine.stats().steps <= 3 + 10  # three chunks, and the choices decode together


def test_a_tied_head_and_repeated_specialists_answer_as_the_plain_loop():
    model = make_fused(make_trio(tied=True))
    reference = twin(model)
    for runner in ("stacked", "sequential"):
        engine = make_engine(model, runner=runner)
        for request, heard in zip(MIX[:2], run(engine, *MIX[:2]), strict=True):
            assert_answers(reference, request, heard)


def test_counters_count_what_was_read_written_and_drafted():
    engine = make_engine(make_fused(), chunk=100)
    assert not engine.has_work
    run(engine, greedy(7, 13, 5, max_tokens=4), greedy(3, 3, 3, max_tokens=1))

    stats = engine.stats()

    assert (stats.prompt_tokens, stats.generated_tokens) == (13 + 3, 4 + 1)
    assert (stats.num_running, stats.num_waiting, stats.cached_tokens, stats.num_slots) == (0, 0, 0, 4)
    assert stats.steps == 2 + 3  # two prompts, then three tokens more of the first
