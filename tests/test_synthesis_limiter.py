"""Limits and addresses, told the time: nothing here sleeps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthesis_helpers import make_recipe, make_request
from ultrafuser.synthesis.asking.budget import Budget, Share, most
from ultrafuser.synthesis.asking.endpoints.limiter import LONGEST_REST_S, Bucket, Concurrency
from ultrafuser.synthesis.asking.endpoints.pool import REFUSED_AT_FIRST, REFUSED_IN_A_ROW, Pool, Ticket
from ultrafuser.synthesis.asking.endpoints.refusal import Refusal, RefusalKind
from ultrafuser.synthesis.node import Answer
from ultrafuser.synthesis.queue import Spent
from ultrafuser.synthesis.recipe import EndpointConfig, LimitsConfig

ANSWER = Answer("text", "stop", 10, 10, 0.0, "m")


def refusal(kind: RefusalKind, retry_after_s: float | None = None, **fields: Any) -> Refusal:
    return Refusal(kind, f"it is {kind}", retry_after_s, **fields)


# ---------------------------------------------------------------------------------------------- concurrency


@settings(deadline=None)
@given(
    st.integers(1, 100),
    st.lists(st.tuples(st.sampled_from(["begin", "answered", "refused", "ended"]), st.integers(0, 99)), max_size=300),
)
def test_concurrency_stays_between_one_and_the_ceiling(ceiling: int, steps: list[tuple[str, int]]) -> None:
    limiter, places, now = Concurrency(ceiling), [], 0.0
    for step, number in steps:
        now += number / 10
        if step == "begin":
            if limiter.wait_s(now) == 0:
                places.append(limiter.begin(now))
        elif places:
            place = places.pop(number % len(places))
            if step == "refused":
                limiter.refused(place, now, None if number % 2 else float(number))
            else:
                getattr(limiter, step)(place)
        assert 1 <= limiter.limit <= ceiling
        assert limiter.num_under_way == len(places) <= ceiling


def test_a_window_of_refusals_halves_once() -> None:
    limiter = Concurrency(32)
    places = [limiter.begin(0.0) for _ in range(32)]

    for place in places:
        limiter.refused(place, 1.0)

    assert limiter.limit == 16


def test_refusals_of_requests_sent_after_the_halving_halve_again() -> None:
    limiter = Concurrency(32)
    first, second = limiter.begin(0.0), limiter.begin(0.0)
    limiter.refused(first, 1.0)
    limiter.refused(second, 1.0)

    limiter.refused(limiter.begin(2.0), 3.0)

    assert limiter.limit == 8


def test_it_grows_by_a_step_for_each_window_of_answers() -> None:
    limiter = Concurrency(32)
    limiter.refused(limiter.begin(0.0), 0.0)

    for _ in range(16):
        limiter.answered(limiter.begin(99.0))
    assert limiter.limit == 17

    for _ in range(16):
        limiter.answered(limiter.begin(99.0))
    assert limiter.limit == 17


@pytest.mark.parametrize("capacity", [1, 3, 10, 50])
def test_it_settles_near_what_an_endpoint_takes(capacity: int) -> None:
    """An endpoint that refuses whatever is over its capacity, each request taking one second."""
    limiter, now, under_way, sizes = Concurrency(64), 0.0, [], []
    for _ in range(4000):
        while limiter.wait_s(now) == 0:
            place = limiter.begin(now)
            if len(under_way) >= capacity:
                limiter.refused(place, now)
            else:
                under_way.append((now + 1.0, place))
        now += 0.05
        for end, place in list(under_way):
            if end <= now:
                under_way.remove((end, place))
                limiter.answered(place)
        sizes.append(len(under_way))

    assert sum(sizes[2000:]) / 2000 >= 0.5 * capacity


def test_retry_after_is_kept_to() -> None:
    limiter = Concurrency(4)
    limiter.refused(limiter.begin(0.0), 10.0, 7.0)

    assert limiter.wait_s(12.0) == 5.0
    assert limiter.wait_s(17.0) == 0.0


def test_without_retry_after_rests_double_until_something_is_answered() -> None:
    limiter, now, rests = Concurrency(4), 0.0, []
    for _ in range(12):
        limiter.refused(limiter.begin(now), now)
        rests.append(limiter.wait_s(now))
        now += rests[-1]

    assert rests[:4] == [0.25, 0.5, 1.0, 2.0]
    assert rests[-1] == LONGEST_REST_S

    limiter.answered(limiter.begin(now))
    limiter.refused(limiter.begin(now), now)
    assert limiter.wait_s(now) == pytest.approx(0.25)


def test_after_two_rests_one_request_finds_out_whether_it_answers_again() -> None:
    limiter = Concurrency(64)
    limiter.refused(limiter.begin(0.0), 0.0)
    limiter.refused(limiter.begin(1.0), 1.0)

    place = limiter.begin(9.0)
    assert limiter.wait_s(9.0) == float("inf")

    limiter.answered(place)
    assert limiter.wait_s(9.0) == 0.0


def test_a_lost_connection_rests_without_asking_less_at_once() -> None:
    limiter = Concurrency(32)
    limiter.refused(limiter.begin(0.0), 0.0, for_load=False)

    assert limiter.limit == 32
    assert limiter.wait_s(0.0) > 0


# ---------------------------------------------------------------------------------------------- per minute


@settings(deadline=None)
@given(
    st.floats(1, 1e6),
    st.lists(st.tuples(st.floats(0, 30), st.floats(0.1, 5000)), min_size=1, max_size=100),
)
def test_no_more_is_taken_than_the_rate_allows(per_minute: float, wishes: list[tuple[float, float]]) -> None:
    bucket, now, taken = Bucket(per_minute), 0.0, []
    for pause, amount in wishes:
        now += pause
        if (wait_s := bucket.wait_s(amount, now)) > 0:
            now += wait_s * (1 + 1e-9) + 1e-6
        bucket.take(amount, now)
        taken.append((now, amount))

    largest = max(amount for _, amount in taken)
    total = sum(amount for _, amount in taken)
    room = max(1.0, per_minute / 6)
    assert total <= room + largest + per_minute * (now / 60) + 1e-3 * total + 1


def test_what_was_not_used_is_put_back_and_what_was_used_beyond_is_owed() -> None:
    bucket = Bucket(600.0)  # ten a second, with room for a hundred
    bucket.take(100.0, 0.0)
    assert bucket.wait_s(50.0, 0.0) == 5.0

    bucket.take(-50.0, 0.0)
    assert bucket.wait_s(50.0, 0.0) == 0.0

    bucket.take(150.0, 0.0)
    assert bucket.wait_s(50.0, 0.0) == 15.0


def test_more_than_there_is_room_for_is_taken_when_it_is_full() -> None:
    bucket = Bucket(600.0)
    assert bucket.wait_s(5000.0, 0.0) == 0.0

    bucket.take(5000.0, 0.0)
    assert bucket.wait_s(1.0, 0.0) == pytest.approx(490.1)


def test_without_a_limit_nothing_waits() -> None:
    assert Bucket(None).wait_s(1e12, 0.0) == 0.0


# ---------------------------------------------------------------------------------------------- addresses


def pool_of(*urls: str, give_up_after_s: float = 600.0, **config: Any) -> Pool:
    config = {"url": tuple(urls or ["http://a/v1"]), "model": "m", "concurrency": 4} | config
    return Pool.open({"writer": EndpointConfig.model_validate(config)}, give_up_after_s)


def begin(pool: Pool, now: float = 0.0, tokens: int = 10) -> Ticket:
    ticket = pool.begin("writer", tokens, now)
    assert isinstance(ticket, Ticket), ticket
    return ticket


def test_requests_are_spread_over_the_addresses() -> None:
    pool = pool_of("http://a/v1", "http://b/v1")

    for _ in range(4):
        begin(pool)

    assert [a.concurrency.num_under_way for a in pool.endpoints["writer"].addresses] == [2, 2]


def test_an_address_at_rest_leaves_the_others_at_work() -> None:
    pool = pool_of("http://a/v1", "http://b/v1")
    first = begin(pool)
    pool.end(first, refusal("overloaded", 60.0), 1.0)

    tickets = [begin(pool, 2.0) for _ in range(4)]

    assert all(ticket.address is not first.address for ticket in tickets)
    assert pool.begin("writer", 10, 2.0) == 59.0


def test_requests_per_minute_hold_for_all_addresses_together() -> None:
    pool = pool_of("http://a/v1", "http://b/v1", requests_per_minute=6.0)
    begin(pool)

    assert pool.begin("writer", 10, 0.0) == 10.0


def test_tokens_are_corrected_when_the_answer_is_there() -> None:
    pool = pool_of(tokens_per_minute=600.0)
    ticket = begin(pool, 0.0, tokens=100)
    assert pool.begin("writer", 80, 0.0) == 8.0

    pool.end(ticket, ANSWER, 0.0)  # which took 20
    begin(pool, 0.0, tokens=80)


def test_an_endpoint_that_answers_nothing_for_long_ends_the_run_with_its_last_word() -> None:
    pool = pool_of(give_up_after_s=100.0)
    now = 0.0
    while pool.ends_run() is None:
        ticket = pool.begin("writer", 10, now)
        if isinstance(ticket, Ticket):
            now += 1.0
            pool.end(ticket, refusal("unreachable"), now)
        elif pool.ends_run() is None:
            now += ticket
        assert now < 200

    assert now >= 100
    assert "it is unreachable" in (pool.ends_run() or "")
    assert "give_up_after_s" in (pool.ends_run() or "")


def test_a_long_retry_after_does_not_hide_that_it_is_time_to_give_up() -> None:
    pool = pool_of(give_up_after_s=100.0)
    pool.end(begin(pool, 0.0), refusal("overloaded", 3600.0), 1.0)

    wait_s = pool.begin("writer", 10, 1.0)

    assert wait_s == 99.0
    pool.begin("writer", 10, 101.0)
    assert pool.ends_run() is not None


def test_one_answer_in_time_keeps_an_endpoint() -> None:
    pool = pool_of(give_up_after_s=100.0)
    pool.end(begin(pool, 0.0), refusal("passing"), 1.0)
    pool.end(begin(pool, 90.0), ANSWER, 95.0)
    pool.end(begin(pool, 110.0), refusal("passing"), 130.0)

    assert pool.ends_run() is None


def test_time_in_which_nobody_asks_does_not_count() -> None:
    pool = pool_of(give_up_after_s=100.0)
    pool.end(begin(pool, 0.0), refusal("passing"), 1.0)

    pool.end(begin(pool, 5000.0), refusal("passing"), 5001.0)

    assert pool.ends_run() is None


def test_a_wrong_key_ends_the_run_at_once_but_not_one_that_worked_before() -> None:
    pool = pool_of()
    pool.end(begin(pool), refusal("fatal"), 0.0)
    assert pool.ends_run() is not None

    pool = pool_of()
    pool.end(begin(pool), ANSWER, 0.0)
    for number in range(3):
        assert pool.ends_run() is None
        pool.end(begin(pool, 100.0 * (number + 1)), refusal("fatal"), 100.0 * (number + 1))
    assert pool.ends_run() is not None


def test_requests_refused_one_after_another_are_not_to_blame_themselves() -> None:
    for first, number in (([], REFUSED_AT_FIRST), ([ANSWER], REFUSED_IN_A_ROW)):
        pool = pool_of()
        for result in [*first, *[refusal("request")] * number]:
            assert pool.ends_run() is None
            pool.end(begin(pool), result, 0.0)
        assert "in a row" in (pool.ends_run() or "")


def test_overlong_prompts_may_follow_one_another() -> None:
    pool = pool_of()
    for _ in range(100):
        pool.end(begin(pool), refusal("request", is_sure=True), 0.0)
    assert pool.ends_run() is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_whatever_happens_places_are_given_back(seed: int, num_urls: int) -> None:
    rng, now = random.Random(seed), 0.0
    pool = pool_of(*(f"http://{n}/v1" for n in range(num_urls)), give_up_after_s=1e9)
    tickets: list[Ticket] = []
    kinds: list[RefusalKind] = ["overloaded", "unreachable", "timeout", "passing"]
    for _ in range(300):
        now += rng.random() * 5
        ticket = pool.begin("writer", 10, now)
        if isinstance(ticket, Ticket):
            tickets.append(ticket)
        if tickets and rng.random() < 0.6:
            result = ANSWER if rng.random() < 0.5 else refusal(rng.choice(kinds), may_cost=rng.random() < 0.5)
            pool.end(tickets.pop(rng.randrange(len(tickets))), result, now)
        assert pool.endpoints["writer"].num_under_way == len(tickets) <= 4 * num_urls


# ---------------------------------------------------------------------------------------------- budget


@settings(deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 5.0), st.integers(100, 20000))
def test_no_order_of_requests_and_answers_exceeds_a_budget(seed: int, max_cost: float, max_tokens: int) -> None:
    """As long as no answer takes more than its request can: an honest endpoint."""
    rng = random.Random(seed)
    budget = Budget(LimitsConfig(max_cost=max_cost, max_tokens=max_tokens))
    under_way: list[Share] = []
    for _ in range(200):
        share = Share(rng.randint(1, 2000), rng.random())
        if budget.reserve(share):
            under_way.append(share)
        if under_way and rng.random() < 0.5:
            share = under_way.pop(rng.randrange(len(under_way)))
            part = rng.random()
            answer = Answer("", "stop", int(share.tokens * part), 0, share.cost * part, "m")
            budget.settle(share, answer if rng.random() < 0.8 else None, may_cost=rng.random() < 0.5)
        assert budget.spent_cost + budget.lost_cost + budget.reserved_cost <= max_cost * (1 + 1e-9)
        assert budget.spent_tokens + budget.lost_tokens + budget.reserved_tokens <= max_tokens


def test_when_all_is_settled_nothing_stays_reserved() -> None:
    budget = Budget(LimitsConfig(max_cost=100.0))
    shares = [Share(n, 0.1 * n) for n in range(1, 8)]
    for share in shares:
        assert budget.reserve(share)
    for share in shares:
        budget.settle(share, None)

    assert (budget.reserved_cost, budget.reserved_tokens, budget.spent_cost) == (0.0, 0, 0.0)


def test_the_line_at_the_end_of_a_budget_tells_the_limit_and_what_to_raise() -> None:
    budget = Budget(LimitsConfig(max_cost=2.0))
    budget.set_spent(Spent(10, 100, 100, 1.75))
    share = Share(100, 0.5)

    assert not budget.reserve(share)
    line = budget.reached(share)
    assert "limits.max_cost is reached: 1.7500 of 2 spent" in line
    assert "raise limits.max_cost" in line


def test_the_most_a_request_can_take_counts_every_byte_and_all_of_the_answer(tmp_path: Path) -> None:
    config = make_recipe(tmp_path, price={"input": 1e6, "output": 1e6}).endpoints["writer"]
    request = make_request()

    share = most(request, config)

    assert share.tokens >= len(request.messages[0].content.encode()) + request.max_tokens
    assert share.cost == share.tokens
