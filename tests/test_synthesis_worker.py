"""The worker on a real store, over real HTTP: what was asked is on the disk, and nothing is asked twice."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from synthesis_endpoint import Endpoint, serving
from synthesis_helpers import OneThread, make_node, make_recipe, read_whole, spent, states, work
from ultrafuser.errors import SynthesisError
from ultrafuser.synthesis.asking.worker import Recorded, Worker
from ultrafuser.synthesis.node import Answer, Node
from ultrafuser.synthesis.stages.base import ItemDraft, UnreadableError
from ultrafuser.synthesis.storage.store import Store

PRICE = {"input": 1000.0, "output": 2000.0}


@pytest.fixture
def endpoint() -> Any:
    with serving() as endpoint:
        yield endpoint


def test_every_node_is_asked_once_and_its_items_are_stored(tmp_path: Path, endpoint: Endpoint) -> None:
    recipe = make_recipe(tmp_path, endpoint.url)

    worker = work(recipe, map(make_node, range(100)))

    assert states(recipe) == {"answered": 100}
    assert endpoint.calls.total == 100
    assert worker.num_under_way == 0
    with Store.open(recipe, read_only=True) as store:
        assert store.view("text").count("responses", states=("new",)) == 100


def test_nothing_to_do_ends_at_once(tmp_path: Path, endpoint: Endpoint) -> None:
    work(make_recipe(tmp_path, endpoint.url))

    assert endpoint.calls.total == 0


def test_no_more_are_under_way_than_the_recipe_allows(tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.script.latency_s = 0.02

    work(make_recipe(tmp_path, endpoint.url, concurrency=5), map(make_node, range(50)))

    assert endpoint.calls.most_at_once == 5


def test_a_place_is_free_when_the_answer_is_on_the_disk_and_not_before(tmp_path: Path, endpoint: Endpoint) -> None:
    """So a kill at any moment repeats at most as many calls as may be under way."""
    recipe, worst = make_recipe(tmp_path, endpoint.url, concurrency=4), 0

    with Store.open(recipe) as store:
        store.plan([make_node(number) for number in range(60)])
        record = store.record

        def slowly(*args: Any) -> None:
            nonlocal worst
            time.sleep(0.03)
            worst = max(worst, sum(endpoint.calls.answered.values()) - store.spent().num_answers)
            record(*args)

        store.record = slowly  # type: ignore[method-assign]
        worker = Worker(recipe, store, OneThread(), read_whole)
        worker.close()
        asyncio.run(worker.work())

    assert states(recipe) == {"answered": 60}
    assert 1 < worst <= 4


def test_answers_that_come_together_are_written_together(tmp_path: Path, endpoint: Endpoint) -> None:
    recipe, groups = make_recipe(tmp_path, endpoint.url, concurrency=32), []

    def count(recorded: Recorded) -> None:
        groups.append(len(recorded.finished))

    with Store.open(recipe) as store:
        store.plan([make_node(number) for number in range(200)])
        worker = Worker(recipe, store, OneThread(), read_whole, count)
        worker.close()
        asyncio.run(worker.work())

    assert sum(groups) == 200
    assert len(groups) < 100


def test_nodes_that_come_later_are_asked_when_it_is_woken(tmp_path: Path, endpoint: Endpoint) -> None:
    recipe, run = make_recipe(tmp_path, endpoint.url), OneThread()

    async def go(store: Store) -> None:
        worker = Worker(recipe, store, run, read_whole)
        working = asyncio.create_task(worker.work())
        await asyncio.sleep(0.2)
        assert not working.done()
        for start in (0, 10):
            await run(lambda start=start: store.plan([make_node(start + n) for n in range(10)]))  # type: ignore[misc]
            worker.wake()
            async with asyncio.timeout(1.5):  # less than the worker would wait without being woken
                while endpoint.calls.total < start + 10:
                    await asyncio.sleep(0.01)
        worker.close()
        await working

    with Store.open(recipe) as store:
        asyncio.run(go(store))
    assert states(recipe) == {"answered": 20}


def test_an_answer_that_cannot_be_read_is_kept_and_says_why(tmp_path: Path, endpoint: Endpoint) -> None:
    def read(_node: Node, _answer: Answer) -> list[ItemDraft]:
        raise UnreadableError("no list")

    recipe = make_recipe(tmp_path, endpoint.url)
    work(recipe, map(make_node, range(3)), read=read)

    assert states(recipe) == {"unreadable": 3}
    assert spent(recipe).num_answers == 3


def test_a_bug_in_reading_loses_no_answer_and_shows_itself(tmp_path: Path, endpoint: Endpoint) -> None:
    def read(_node: Node, _answer: Answer) -> list[ItemDraft]:
        raise ZeroDivisionError

    recipe = make_recipe(tmp_path, endpoint.url)
    with pytest.raises(ZeroDivisionError):
        work(recipe, map(make_node, range(3)), read=read)

    assert spent(recipe).num_answers == endpoint.calls.total


@pytest.mark.parametrize("fault", ["500", "malformed", "truncated", "reset", "error"])
def test_passing_failures_are_tried_again(tmp_path: Path, endpoint: Endpoint, fault: str) -> None:
    endpoint.script.faults = {fault: 0.3}
    recipe = make_recipe(tmp_path, endpoint.url, limits={"max_attempts": 20})

    work(recipe, map(make_node, range(40)))

    assert states(recipe) == {"answered": 40}
    assert endpoint.calls.total > 40
    assert endpoint.calls.repeated == 0 or fault in ("truncated", "reset")


def test_after_max_attempts_a_node_has_failed_and_the_others_go_on(tmp_path: Path, endpoint: Endpoint) -> None:
    recipe = make_recipe(tmp_path, endpoint.url, limits={"max_attempts": 3})
    endpoint.script.faults = {"500": 0.6}

    work(recipe, map(make_node, range(30)))

    found = states(recipe)
    assert found["failed"] > 0
    assert found["answered"] > 0
    assert max(endpoint.calls.by_content.values()) == 3


def test_refusals_for_load_are_no_attempts(tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.script.max_at_once, endpoint.script.latency_s = 2, 0.01
    recipe = make_recipe(tmp_path, endpoint.url, concurrency=16, limits={"max_attempts": 1})

    worker = work(recipe, map(make_node, range(60)))

    assert states(recipe) == {"answered": 60}
    assert endpoint.calls.statuses["429"] > 0
    assert worker.pool.endpoints["writer"].limit < 16


@pytest.mark.parametrize("retry_after", ["1", "date:1.5"])
def test_retry_after_is_waited_for(tmp_path: Path, endpoint: Endpoint, retry_after: str) -> None:
    endpoint.script.requests_per_s, endpoint.script.retry_after = 5, retry_after

    work(make_recipe(tmp_path, endpoint.url, concurrency=8), map(make_node, range(14)))

    assert endpoint.calls.statuses["429"] <= 3 * 8


def test_an_overlong_prompt_fails_alone(tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.script.faults = {"overlong": 0.3}
    recipe = make_recipe(tmp_path, endpoint.url)

    work(recipe, map(make_node, range(40)))

    found = states(recipe)
    assert found["failed"] + found["answered"] == 40
    assert max(endpoint.calls.by_content.values()) == 1


def test_a_wrong_key_ends_with_one_line_and_loses_nothing(tmp_path: Path, endpoint: Endpoint, monkeypatch: Any) -> None:
    endpoint.script.key = "sk-true-and-secret"
    monkeypatch.setenv("WRITER_KEY", "sk-wrong-and-secret")
    recipe = make_recipe(tmp_path, endpoint.url, key_variable="WRITER_KEY")

    with pytest.raises(SynthesisError, match="WRITER_KEY") as caught:
        work(recipe, map(make_node, range(40)))

    assert "\n" not in str(caught.value)
    assert states(recipe) == {"waiting": 40}
    assert not any(b"sk-wrong-and-secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    monkeypatch.setenv("WRITER_KEY", "sk-true-and-secret")
    work(recipe)
    assert states(recipe) == {"answered": 40}
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_page_instead_of_json_asks_for_the_address(tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.script.html = True

    with pytest.raises(SynthesisError, match="is the address up to /v1"):
        work(make_recipe(tmp_path, endpoint.url), [make_node()])


def test_an_unknown_model_names_it(tmp_path: Path, endpoint: Endpoint) -> None:
    with pytest.raises(SynthesisError, match="'other'"):
        work(make_recipe(tmp_path, endpoint.url, model="other"), [make_node(model="other")])


def test_an_endpoint_that_is_down_too_long_ends_the_run(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "http://127.0.0.1:9/v1", limits={"give_up_after_s": 0.5})

    with pytest.raises(SynthesisError, match="answered nothing for"):
        work(recipe, map(make_node, range(20)))

    assert states(recipe) == {"waiting": 20}


def test_an_endpoint_that_comes_back_in_time_is_gone_on_with(tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.script.down = True
    threading.Timer(0.6, lambda: endpoint.script.change({"down": False})).start()
    recipe = make_recipe(tmp_path, endpoint.url)

    work(recipe, map(make_node, range(20)))

    assert states(recipe) == {"answered": 20}


def test_another_address_takes_over_from_one_that_is_down(tmp_path: Path, endpoint: Endpoint) -> None:
    recipe = make_recipe(tmp_path, ("http://127.0.0.1:9/v1", endpoint.url), limits={"give_up_after_s": 5})

    work(recipe, map(make_node, range(40)))

    assert states(recipe) == {"answered": 40}


def test_nodes_of_an_endpoint_that_is_gone_from_the_recipe_are_told(
    tmp_path: Path, endpoint: Endpoint, monkeypatch: Any
) -> None:
    monkeypatch.setattr("ultrafuser.synthesis.asking.worker.LOOK_AGAIN_S", 0.05)

    with pytest.raises(SynthesisError, match="an endpoint that the recipe does not have; it has writer"):
        work(make_recipe(tmp_path, endpoint.url), [make_node(endpoint="reader")])


@pytest.mark.parametrize("budget", [0.5, 1.0, 2.5])
def test_a_budget_of_money_is_used_and_never_exceeded(tmp_path: Path, endpoint: Endpoint, budget: float) -> None:
    recipe = make_recipe(tmp_path, endpoint.url, concurrency=8, price=PRICE, limits={"max_cost": budget * 4})

    with pytest.raises(SynthesisError, match=r"limits.max_cost is reached: .* raise limits.max_cost"):
        work(recipe, map(make_node, range(300)))

    assert 0 < spent(recipe).cost <= budget * 4
    assert states(recipe)["answered"] == endpoint.calls.total  # what was asked was kept


def test_a_budget_of_tokens_is_never_exceeded_and_goes_on_when_raised(tmp_path: Path, endpoint: Endpoint) -> None:
    limits = {"max_tokens": 5000}
    recipe = make_recipe(tmp_path, endpoint.url, limits=limits)
    with pytest.raises(SynthesisError, match=r"limits.max_tokens is reached"):
        work(recipe, map(make_node, range(100)))
    before = spent(recipe)
    assert 3000 < before.prompt_tokens + before.completion_tokens <= 5000

    work(make_recipe(tmp_path, endpoint.url, limits={"max_tokens": 10**7}))

    assert states(recipe) == {"answered": 100}
    assert endpoint.calls.total == 100


def test_an_endpoint_that_lies_about_usage_cannot_free_itself_of_the_budget(tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.script.faults = {"usage_negative": 0.5, "usage_missing": 0.5}
    recipe = make_recipe(tmp_path, endpoint.url, price=PRICE, limits={"max_cost": 4.0})

    with pytest.raises(SynthesisError, match="max_cost is reached"):
        work(recipe, map(make_node, range(300)))

    assert spent(recipe).cost <= 4.0


def test_stop_writes_what_is_under_way_and_asks_nothing_more(tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.script.latency_s = 0.2
    recipe = make_recipe(tmp_path, endpoint.url, concurrency=4)

    async def stop(worker: Worker) -> None:
        while endpoint.calls.total < 4:
            await asyncio.sleep(0.01)
        worker.stop()

    work(recipe, map(make_node, range(40)), during=stop)

    assert states(recipe) == {"answered": 4, "waiting": 36}
    assert endpoint.calls.total == 4


def test_a_second_stop_gives_up_what_is_under_way(tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.script.latency_s = 30.0
    recipe = make_recipe(tmp_path, endpoint.url, concurrency=4)

    async def stop(worker: Worker) -> None:
        while endpoint.calls.total < 4:
            await asyncio.sleep(0.01)
        worker.stop()
        worker.stop()

    start = time.monotonic()
    work(recipe, map(make_node, range(40)), during=stop)

    assert time.monotonic() - start < 10
    assert states(recipe) == {"waiting": 40}


def test_what_cannot_be_written_ends_the_run_and_is_written_at_the_end_if_it_can(
    tmp_path: Path, endpoint: Endpoint
) -> None:
    """A disk that was full for a moment loses no answer."""
    recipe, fails = make_recipe(tmp_path, endpoint.url), [True]

    with Store.open(recipe) as store:
        store.plan([make_node(number) for number in range(40)])
        record = store.record

        def full(*args: Any) -> None:
            if fails and fails.pop():
                raise SynthesisError("the disk is full")
            record(*args)

        store.record = full  # type: ignore[method-assign]
        worker = Worker(recipe, store, OneThread(), read_whole)
        worker.close()
        with pytest.raises(SynthesisError, match="the disk is full"):
            asyncio.run(worker.work())

    assert states(recipe)["answered"] == endpoint.calls.total


def test_two_endpoints_work_side_by_side_while_one_is_down(tmp_path: Path, endpoint: Endpoint) -> None:
    recipe = make_recipe(tmp_path, endpoint.url, limits={"give_up_after_s": 2.0})
    dead = recipe.endpoints["writer"].model_copy(update={"url": "http://127.0.0.1:9/v1"})
    recipe = recipe.model_copy(update={"endpoints": {**recipe.endpoints, "reader": dead}})

    with pytest.raises(SynthesisError, match="endpoint reader has answered nothing"):
        work(recipe, [*map(make_node, range(50)), make_node(99, endpoint="reader")])

    assert states(recipe) == {"answered": 50, "waiting": 1}
