"""What is drafted: lookups against a search by hand, and plans that follow what guesses earned and passes cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_helpers import always_draft, assert_answers, greedy, make_engine, make_similar, run, twin
from helpers import make_fused, make_model
from ultrafuser.engine.certainty import Certainty, Course
from ultrafuser.engine.drafts import LENGTHS, PLAIN, Costs, DraftHistory, DraftKind, Lookup, Plan, Planner
from ultrafuser.engine.requests import GenerationRequest
from ultrafuser.engine.sampling import Sampler
from ultrafuser.generation import SamplingParams


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


def test_new_choices_go_on_waiting_where_those_before_them_did():
    """Else every short answer would try again what never paid."""
    planner = make_planner(("lookup",), **{f"rows_{n + 1}": 1.2 for n in LENGTHS})
    drafted = []
    for _ in range(60):  # answers of twenty tokens
        history = planner.make_history()
        for _ in range(20):
            plan = planner.plan(1, [history], everything())
            drafted.append(plan.kind is not None)
            if plan.kind is None:
                planner.pass_over(history, ["lookup"])
            else:
                planner.observe(history, plan, 0, plan.length)
    assert 1 <= sum(drafted[600:]) <= 4


def test_what_a_step_takes_beside_its_passes_counts():
    planner = make_planner(("lookup",), **{f"rows_{n + 1}": 1.0 for n in LENGTHS})
    costs = planner.costs
    assert planner.plan(1, [DraftHistory()], everything()).kind == "lookup"
    for _ in range(3):
        costs.observe_rest(None, 0.1)
        costs.observe_rest("lookup", 4.0)
    assert planner.plan(1, [DraftHistory()], everything()) == PLAIN


def test_where_a_pass_is_shorter_than_a_millisecond_nothing_is_drafted():
    """Noise would decide: what drafts save there is less than what bookkeeping takes."""
    planner = make_planner(("lookup",), **{f"rows_{n + 1}": 1.0 for n in LENGTHS})
    assert planner.plan(1, [DraftHistory()], everything()).kind == "lookup"
    planner.costs.planning[1] = 1e-5
    planner.costs.passes = {key: 9e-4 * seconds for key, seconds in planner.costs.passes.items()}
    assert planner.plan(1, [DraftHistory()], everything()) == PLAIN
    assert planner.rest_after(1) == 16


def test_deciding_rests_where_it_takes_more_than_its_share():
    planner = make_planner(("lookup",))
    assert planner.rest_after(1) == 0  # nothing is known of what it takes
    for seconds, steps in ((1e-4, 0), (0.05, 2), (0.25, 12), (100.0, 16)):
        planner.costs.planning[1] = seconds
        assert planner.rest_after(1) == steps


def test_a_kind_whose_guesses_fail_is_left_and_tried_again_ever_more_rarely():
    planner = make_planner(("lookup",), **{f"rows_{n + 1}": 1.2 for n in LENGTHS})
    history = DraftHistory()
    plans = []
    for _ in range(400):
        plan = planner.plan(1, [history], everything())
        plans.append(plan)
        if plan.kind is None:
            planner.pass_over(history, ["lookup"])
        else:
            planner.observe(history, plan, 0, plan.length)

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


def saw_blocks(planner: Planner, history: DraftHistory, *, agreed: int, written: int, margin: float = 2.0) -> None:
    """Many open drafts of the same fate."""
    plan = Plan("self", 8, is_open=True)
    for _ in range(60):
        margins = [margin] * written
        planner.observe_course(history, plan, margins, agreed=agreed, tokens=agreed + 1, read=written)


def test_who_runs_ahead_is_planned_by_what_its_blocks_gave_and_what_their_parts_cost():
    """How far it goes is open: it says so itself."""
    planner = make_planner(("self",), **{f"rows_{rows}": 1.0 for rows in range(2, 10)})
    planner.is_read_again = True
    for _ in range(2):
        planner.costs.observe_feed("self", 1, 0.2)
    history = planner.make_history()
    saw_blocks(planner, history, agreed=1, written=2)  # two tokens for 1 + 2 * .2 s
    assert planner.plan(1, [history], everything()) == Plan("self", 8, is_open=True)
    assert planner.plan(1, [history], everything(3)) == Plan("self", 3, is_open=True)
    for _ in range(40):
        planner.costs.observe_feed("self", 1, 0.8)  # now for 1 + 2 * .8 s
    assert planner.plan(1, [history], everything()) == PLAIN


def test_a_lookup_is_judged_by_what_matches_of_its_length_gave():
    """Long ones are mostly right and short ones are not: one share for both would be wrong for both."""
    planner = make_planner(("lookup",), **{f"rows_{n + 1}": 1.5 for n in LENGTHS})
    history = planner.make_history()
    for _ in range(60):
        for matched, agreed in ((4, 4), (2, 0)):
            history.num_matched = matched
            planner.observe(history, Plan("lookup", 4), agreed, 4)
    for one in (history, planner.make_history()):
        one.num_matched = 4
        assert planner.plan(1, [one], everything()).kind == "lookup"
        one.num_matched = 2
        assert planner.plan(1, [one], everything()) == PLAIN


def make_course(certainty: Certainty | None = None, *, feed: float = 0.2, block: float = 1.5) -> Course:
    """A token is worth a second, a pass of several rows costs `block`."""
    return Course(
        certainty or Certainty(),
        rate=0.8,
        worth=1.0,
        feed=feed,
        of_pass=lambda length: block if length else 1.0,
    )


def test_a_draft_goes_on_while_its_writer_is_sure_and_stops_when_it_is_not():
    course = make_course()
    assert all(course.goes_on([9.0]) for _ in range(8))
    assert not course.goes_on([0.01]) or not course.goes_on([0.01])  # one coin may do, two are too many
    assert make_course(feed=0.05).goes_on([0.1])
    assert not make_course(feed=0.5).goes_on([0.1])


def test_of_a_draft_only_so_much_is_read_as_pays():
    sure, unsure = make_course(), make_course(block=1.9)
    for margin in (9.0, 9.0, 0.1):
        sure.goes_on([margin])
    unsure.goes_on([0.1])
    assert sure.pays() == 3  # the last row costs nothing
    assert unsure.pays() == 0  # half a token for nine tenths of a pass
    dear = Course(Certainty(), rate=0.8, worth=1.0, feed=0.1, of_pass=lambda length: 1 + 0.6 * length)
    for margin in (9.0, 9.0, 0.1):
        dear.goes_on([margin])
    assert dear.pays() == 2  # a row costs more than half a token


def test_two_choices_share_the_length_of_a_draft():
    """So it depends on both: one that is sure may carry one that is not."""
    assert make_course(feed=0.3).goes_on([9.0])
    assert make_course(feed=0.3).goes_on([9.0, 0.1])
    assert not make_course(feed=0.4).goes_on([0.1, 0.1])


def test_how_likely_a_guess_is_right_is_learnt_from_guesses_of_its_margin():
    certainty = Certainty()
    before = certainty.chance(9.0)
    for number in range(400):
        certainty.observe(0.1, number % 4 == 0)
    assert certainty.chance(0.2) == pytest.approx(0.25, abs=0.05)
    assert certainty.chance(9.0) == before


def test_only_guesses_that_were_compared_count():
    """Behind the first wrong one nothing is known; of one more than was read it is."""
    planner = make_planner(("self",))
    history = planner.make_history()
    margins = [9.0, 0.1, 3.0, 3.0]
    before = [planner.certainty["self"].chance(margin) for margin in margins]
    planner.observe_course(history, Plan("self", 8, is_open=True), margins, agreed=1, tokens=2, read=4)
    after = [planner.certainty["self"].chance(margin) for margin in margins]
    assert after[0] > before[0]
    assert after[1] < before[1]
    assert after[2:] == before[2:]


@given(st.integers(0, 2**20), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([1.0, 0.8]))
@settings(max_examples=60, deadline=None)
def test_a_guess_is_what_is_picked_and_its_margin_is_what_the_next_best_lacks(
    seed: int, temperature: float, top_p: float
):
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed)
    sampler = Sampler(params, choice=0, prompt=(), ends=())
    logits = torch.randn(30, generator=torch.Generator().manual_seed(seed))
    token, margin = sampler.guess(logits, (3, 4))
    assert token == sampler.pick(logits, (3, 4))
    assert margin >= 0
    if top_p == 1.0:

        def lowered(by: float) -> int:
            less = logits.clone()
            less[token] -= by
            return sampler.pick(less, (3, 4))

        assert lowered(margin - 1e-3) == token
        assert lowered(margin + 1e-3) != token


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


class SaidCosts(Costs):
    """A pass of one row takes a second, one of more rows a little more, a drafted token a tenth."""

    def of_pass(self, num_choices: int, rows: float) -> float:
        del num_choices
        return 1.0 if rows <= 1 else 1.3

    def observe_feed(self, kind: DraftKind, num_choices: int, seconds: float, num_tokens: int = 1) -> None:
        del seconds, num_tokens
        self.feeds[kind, num_choices] = 0.1


@pytest.mark.parametrize(("kind", "draft_weights"), [("self", "auto"), ("self", "exact"), ("model", "exact")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_open_drafts_change_no_token(kind: Any, draft_weights: Any, temperature: float):
    """Long ones, short ones and such as nobody reads: specialists that half agree make them all."""
    model = make_fused(make_similar(noise=0.05))
    requests = [
        greedy(7, 9, 5, seed=seed, draw_seed=seed, max_tokens=40, ignore_end=True, temperature=temperature)
        for seed in range(2)
    ]
    expected = [run(make_engine(twin(model)), request)[0].ids() for request in requests]
    engine = make_engine(model, draft=make_model(seed=0), drafts=(kind,), draft_weights=draft_weights)
    engine.planner.costs = SaidCosts()

    def plan(num_choices: int, histories: Any, possible: dict[DraftKind, int]) -> Plan:
        del num_choices, histories
        length = min(8, possible.get(kind, 0))
        return Plan(kind, length, is_open=True) if length else PLAIN

    engine.planner.plan = plan  # type: ignore[method-assign]

    heard = run(engine, *requests)

    assert [one.ids() for one in heard] == expected
    stats = engine.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


def test_while_deciding_rests_nothing_is_drafted_and_the_answer_is_the_same():
    model = make_fused(make_similar())
    request = greedy(30, 30, 30, max_tokens=21, ignore_end=True)
    expected = run(make_engine(twin(model)), request)[0].ids()
    engine = make_engine(model, drafts=("lookup",))
    asked = 0

    def plan(*_: Any) -> Plan:
        nonlocal asked
        asked += 1
        return PLAIN

    engine.planner.plan = plan  # type: ignore[method-assign]
    engine.planner.rest_after = lambda _: 3  # type: ignore[method-assign]
    (heard,) = run(engine, request)
    assert heard.ids() == expected
    assert asked == 5  # of twenty steps every fourth; the first token comes of reading the prompt


def test_what_the_text_says_is_compared_though_nobody_reads_it():
    """So a lookup that is not worth a try today is found out without one."""
    engine = make_engine(make_fused(make_similar()), drafts=("lookup",))
    engine.planner.plan = lambda *_: PLAIN  # type: ignore[method-assign]
    first = engine.planner.make_history().record("lookup").rate
    run(engine, greedy(30, 30, 30, max_tokens=50, ignore_end=True))

    history = engine.planner.make_history()
    rates = {matched: record.rate for (_, matched), record in history.records.items() if matched}
    assert rates
    assert all(rate != first for rate in rates.values())
    assert engine.stats().drafted_tokens == 0
