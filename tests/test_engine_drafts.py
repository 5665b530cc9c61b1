"""What is drafted: lookups against a search by hand, and plans that follow what guesses earned and passes cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_helpers import always_draft, assert_answers, greedy, make_engine, make_similar, run
from helpers import make_fused, make_model
from ultrafuser.engine.drafts import LENGTHS, PLAIN, Costs, DraftHistory, DraftKind, Lookup, Plan, Planner
from ultrafuser.engine.requests import GenerationRequest


def search(text: Sequence[int], length: int, sizes: Sequence[int] = (4, 3, 2)) -> list[int]:
    """What followed the last tokens at their latest earlier place, the longest match first."""
    text = list(text)
    for size in sizes:
        for stop in range(len(text) - 1, size - 1, -1):
            if len(text) > size and text[stop - size : stop] == text[-size:]:
                return text[stop : stop + length]
    return []


@given(st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=6), st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_a_lookup_finds_what_a_search_by_hand_finds_however_the_text_grew(parts: list[list[int]], length: int):
    text: list[int] = []
    lookup = Lookup(())
    for part in parts:
        lookup.extend(part)
        text += part
        assert lookup.draft(length) == search(text, length)
    assert Lookup(text).draft(length) == search(text, length)


def test_a_lookup_takes_the_latest_place_of_the_longest_match():
    assert Lookup([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3]).draft(2) == [7, 9]  # three agree there, two at the later place
    assert Lookup([2, 3, 7, 2, 3, 8, 2, 3]).draft(1) == [8]
    assert Lookup([1, 2, 3]).draft(4) == []


# Plans


def make_planner(kinds: tuple[DraftKind, ...] = ("lookup", "self"), **costs: float) -> Planner:
    """One row costs 1 s, a block of `rows` what `rows_N` says."""
    planner = Planner(kinds, num_specialists=3, max_choices=2)
    for _ in range(2):  # the first time is not counted
        planner.costs.observe_pass(1, 1, 1.0)
        for name, seconds in costs.items():
            planner.costs.observe_pass(1, int(name.removeprefix("rows_")), seconds)
    return planner


def everything(length: int = 8) -> dict[DraftKind, int]:
    return {"lookup": length, "self": length, "model": length}


def test_nothing_is_drafted_before_a_plain_pass_was_measured_or_when_nothing_can_be():
    fresh = Planner(("lookup",), num_specialists=3, max_choices=2)
    assert fresh.plan(1, [DraftHistory()], everything()) == PLAIN
    assert make_planner().plan(1, [DraftHistory()], {}) == PLAIN
    assert make_planner().plan(1, [DraftHistory()], everything(1)) == PLAIN


def test_nothing_is_drafted_for_more_choices_than_allowed():
    planner = make_planner()
    for _ in range(2):
        planner.costs.observe_pass(3, 1, 1.0)
    assert planner.plan(3, [DraftHistory()] * 3, everything()) == PLAIN


def test_cheap_blocks_are_drafted_long_and_dear_ones_not_at_all():
    cheap = make_planner(("lookup",), **{f"rows_{n + 1}": 1.01 for n in LENGTHS})
    assert cheap.plan(1, [DraftHistory()], everything()) == Plan("lookup", 8)
    assert cheap.plan(1, [DraftHistory()], everything(5)) == Plan("lookup", 4)
    dear = make_planner(("lookup",), **{f"rows_{n + 1}": n + 1.0 for n in LENGTHS})
    assert dear.plan(1, [DraftHistory()], everything()) == PLAIN


def test_a_kind_whose_guesses_fail_is_left_and_tried_again_ever_more_rarely():
    planner = make_planner(("lookup",), **{f"rows_{n + 1}": 1.2 for n in LENGTHS})
    history = DraftHistory()
    plans = []
    for _ in range(400):
        plan = planner.plan(1, [history], everything())
        plans.append(plan)
        if plan.kind is None:
            history.pass_over(["lookup"])
        else:
            history.observe(plan, 0, plan.length)

    drafted = [i for i, plan in enumerate(plans) if plan.kind is not None]
    late = [i for i in drafted if i >= 40]
    assert drafted[0] == 0
    assert 1 <= len(late) <= 8
    gaps = [b - a for a, b in pairwise(late)]
    assert all(later >= earlier for earlier, later in pairwise(gaps))
    assert all(plans[i] == Plan("lookup", LENGTHS[0]) for i in late)


def test_a_kind_whose_guesses_agree_again_is_taken_up_again():
    planner = make_planner(("lookup",), **{f"rows_{n + 1}": 1.2 for n in LENGTHS})
    history = DraftHistory()
    for _ in range(30):
        history.observe(Plan("lookup", 4), 0, 4)
    assert planner.plan(1, [history], everything()) == PLAIN

    for _ in range(30):
        history.observe(Plan("lookup", 4), 4, 4)
    assert planner.plan(1, [history], everything()).kind == "lookup"


def test_a_new_choice_starts_from_what_was_typical_of_those_before():
    """Otherwise each would find out anew, and pay for it, that guesses of a kind are rarely right."""
    planner = make_planner(("lookup",), **{f"rows_{n + 1}": 1.6 for n in LENGTHS})
    assert planner.plan(1, [planner.make_history()], everything()).kind == "lookup"
    history = planner.make_history()
    for _ in range(40):
        planner.observe(history, Plan("lookup", 4), 0, 4)
    assert planner.plan(1, [planner.make_history()], everything()) == PLAIN
    for _ in range(200):
        planner.observe(history, Plan("lookup", 4), 4, 4)
    assert planner.plan(1, [planner.make_history()], everything()).kind == "lookup"


def test_the_kind_that_promises_more_is_taken():
    planner = make_planner(("lookup", "self"), **{f"rows_{n}": 1.05 for n in range(2, 10)})
    for _ in range(2):
        planner.costs.observe_feed("self", 1, 0.01)
    history = DraftHistory()
    for _ in range(20):
        history.observe(Plan("lookup", 4), 1, 4)
        history.observe(Plan("self", 4), 4, 4)
    assert planner.plan(1, [history], everything()).kind == "self"
    assert planner.plan(1, [history], {"lookup": 8}).kind in ("lookup", None)


def test_a_drafter_that_is_as_slow_as_the_model_is_not_used():
    planner = make_planner(("model",), **{f"rows_{n}": 1.05 for n in range(2, 10)})
    for _ in range(2):
        planner.costs.observe_feed("model", 1, 1.0)
    assert planner.plan(1, [DraftHistory()], everything()) == PLAIN


def observed(*passes: tuple[int, float]) -> Costs:
    """Costs after passes of one choice, (rows, seconds); each was met once before, which does not count."""
    costs = Costs()
    for rows in {rows for rows, _ in passes}:
        costs.observe_pass(1, rows, 77.0)
    for rows, seconds in passes:
        costs.observe_pass(1, rows, seconds)
    return costs


def test_costs_of_blocks_that_were_not_measured_are_guessed_from_their_neighbours():
    assert Costs().of_pass(1, 3) is None
    assert observed((1, 1.0)).of_pass(1, 3) == pytest.approx(1.2)
    costs = observed((1, 1.0), (3, 2.0))
    assert costs.of_pass(1, 3) == 2.0
    assert costs.of_pass(1, 2) == pytest.approx(1.5)  # between what is known
    assert costs.of_pass(1, 5) == pytest.approx(2.2)
    assert costs.of_pass(2, 1) is None


def test_the_first_pass_of_its_size_does_not_count():
    costs = Costs()
    costs.observe_pass(1, 1, 50.0)
    assert costs.of_pass(1, 1) is None
    costs.observe_pass(1, 1, 1.0)
    costs.observe_pass(1, 5, 50.0)  # a dear one: kernels were made for it
    assert costs.of_pass(1, 5) == pytest.approx(1.4)
    costs.observe_pass(1, 5, 1.1)
    assert costs.of_pass(1, 5) == pytest.approx(1.1)


def test_a_pass_that_was_held_up_counts_little():
    assert observed((1, 1.0), (1, 1000.0)).of_pass(1, 1) == pytest.approx(1.2)
    assert observed((1, 1000.0), (1, 1.0)).of_pass(1, 1) == pytest.approx(500.5)  # what is faster is believed sooner


def test_a_specialist_in_fewer_bits_is_planned_as_one_more_drafter_whose_block_all_read():
    """It costs less a token, its block a row more, and the block gives a token more."""
    costs = {f"rows_{rows}": 1.0 for rows in range(2, 10)}
    planner = make_planner(("self",), **costs)
    planner.is_read_again = True
    for _ in range(2):
        planner.costs.observe_feed("self", 1, 0.1)
    history = DraftHistory()
    for _ in range(20):
        history.observe(Plan("self", 2), 1, 2)  # one in two
    # Two of 1 + .5 + .25 tokens for 1.2 s; four give less than two tokens for 1.4 s, and no draft one for 1 s.
    assert planner.plan(1, [history], everything()) == Plan("self", 2)
    for _ in range(2):
        planner.costs.observe_feed("self", 1, 1.0)
    assert planner.plan(1, [history], {"self": 2}).kind is None or planner.costs.feeds["self", 1] < 0.4


# In the engine


def alike(length: int, *, max_tokens: int) -> GenerationRequest:
    """One row for all specialists, so that those that are alike say the same."""
    request = greedy(length, max_tokens=max_tokens, ignore_end=True)
    return GenerationRequest(request.prompts * 3, request.params)


@pytest.mark.parametrize("kind", ["lookup", "self", "model"])
def test_drafts_are_counted_and_save_passes_where_they_agree(kind: Any):
    parts = make_similar(noise=1e-4)
    draft = make_model(seed=0)
    engine = make_engine(make_fused(parts), draft=draft, drafts=(kind,))
    always_draft(engine, kind, lengths=(4,))
    request = alike(12, max_tokens=60)

    (heard,) = run(engine, request)

    stats = engine.stats()
    assert_answers(engine.model, request, heard)
    assert 0 < stats.accepted_tokens <= stats.drafted_tokens
    assert stats.generated_tokens == 60
    # One pass reads the prompt; every other writes one token, and those of its draft that agree.
    written = stats.steps + stats.accepted_tokens
    assert 60 - 2 <= written <= 60 + stats.steps
    if kind != "lookup":
        assert stats.accepted_tokens > 0.8 * stats.drafted_tokens
        assert stats.steps < 40


def test_a_batch_that_is_too_large_is_not_drafted_for():
    engine = make_engine(make_fused(make_similar()), drafts=("lookup", "self"), max_draft_choices=1)
    always_draft(engine, "lookup", "self")
    run(engine, *[greedy(7, 9, 5, seed=seed, max_tokens=8, ignore_end=True) for seed in range(2)])
    few = engine.stats().drafted_tokens

    run(engine, greedy(7, 9, 5, max_tokens=30, ignore_end=True))

    # The two were out of step by a round, in which one decoded alone.
    assert few <= 8 < engine.stats().drafted_tokens


def test_no_draft_reaches_beyond_the_last_token():
    engine = make_engine(make_fused(make_similar(noise=1e-4)), drafts=("self",), max_context=32)
    always_draft(engine, "self", lengths=(8,))
    (heard,) = run(engine, alike(26, max_tokens=100))

    assert len(heard.ids()) == 6
    assert engine.stats().drafted_tokens == engine.stats().accepted_tokens == 4  # the first and the last were not
