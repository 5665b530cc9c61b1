"""Batches: requests go out as files, results come back in any order, and a kill repeats nothing."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synthesis_endpoint import Api, Endpoint, Reply, Script, serving
from synthesis_helpers import make_node, make_recipe, make_request, spent, states, work
from ultrafuser.errors import SynthesisError
from ultrafuser.synthesis.asking.batch_files import Damage, read_keys, read_results, write_batches
from ultrafuser.synthesis.asking.budget import Share
from ultrafuser.synthesis.asking.endpoints.client import Client
from ultrafuser.synthesis.asking.worker import Worker
from ultrafuser.synthesis.node import Node


@pytest.fixture
def endpoint() -> Any:
    with serving(batch=True) as endpoint:
        yield endpoint


def client_of(recipe: Any) -> Client:
    config = recipe.endpoints["writer"]
    return Client("writer", config, config.urls[0])


def folder_of(recipe: Any) -> Path:
    return Path(recipe.run_folder) / "batches" / "writer"


def answer_file(path: Path, to: Path, *, change: Callable[[list[str]], list[str]] = lambda lines: lines) -> None:
    """What a provider makes of an input file; `change` spoils it."""
    api, lines = Api(Script()), []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        try:
            reply = api.completion(entry["url"], entry["body"])
        except Reply as refused:
            reply = refused
        response = {"status_code": reply.status, "body": reply.body}
        lines.append(json.dumps({"custom_id": entry["custom_id"], "response": response, "error": None}))
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text("\n".join(change(lines)) + "\n")


# ---------------------------------------------------------------------------------------------- files


def test_a_line_is_a_request_that_openai_takes(tmp_path: Path) -> None:
    node = make_node(7)
    [written] = write_batches([node], client_of(make_recipe(tmp_path, extra_body={"min_p": 0.1})), tmp_path)

    line = json.loads(written.path.read_text())

    assert line["custom_id"] == node.key
    assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
    assert line["body"]["messages"] == [{"role": "user", "content": "Tell me about number 7."}]
    assert (line["body"]["max_tokens"], line["body"]["seed"], line["body"]["min_p"]) == (200, 7, 0.1)


def test_files_are_split_at_lines_at_bytes_and_by_url(tmp_path: Path) -> None:
    client = client_of(make_recipe(tmp_path))
    nodes = [make_node(n) for n in range(10)] + [make_node(n, prompt="<|user|>") for n in range(10, 13)]

    by_lines = write_batches(nodes, client, tmp_path / "a", max_lines=4)
    by_bytes = write_batches(nodes, client, tmp_path / "b", max_bytes=700)

    assert sorted(file.num_lines for file in by_lines) == [2, 3, 4, 4]
    assert all(file.path.stat().st_size <= 700 for file in by_bytes)
    for files in (by_lines, by_bytes):
        assert {key for file in files for key in read_keys(file.path)} == {node.key for node in nodes}
        for file in files:
            assert {json.loads(line)["url"] for line in file.path.read_text().splitlines()} == {file.url}


def test_no_more_is_written_than_the_budget_has_left(tmp_path: Path) -> None:
    client = client_of(make_recipe(tmp_path))
    one = write_batches([make_node(0)], client, tmp_path / "one")[0].share

    files = write_batches(map(make_node, range(10)), client, tmp_path, fits=Share(3 * one.tokens + 5, 1.0))

    assert [file.num_lines for file in files] == [3]
    assert files[0].share.tokens <= 3 * one.tokens + 5


def test_writing_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def nodes() -> Any:
        yield make_node(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_batches(nodes(), client_of(make_recipe(tmp_path)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_broken_lines_are_counted_and_a_cut_file_is_told(tmp_path: Path) -> None:
    good = json.dumps({"custom_id": "a", "response": {"status_code": 200, "body": {}}})
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join([good, "{}", "[]", "null", '{"custom_id": 5}', "", good[:30]]))
    damage = Damage()

    lines = list(read_results(path, damage))

    assert [line.key for line in lines] == ["a"]
    assert (damage.num_broken, damage.is_cut) == (5, True)


# ---------------------------------------------------------------------------------------------- by hand


def test_files_go_out_and_results_come_in_by_hand(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, batch="files")
    with pytest.raises(SynthesisError, match="have them answered as OpenAI batches"):
        work(recipe, map(make_node, range(30)))
    [out] = folder_of(recipe).glob("*.jsonl")
    assert len(list(read_keys(out))) == 30

    def shuffle(lines: list[str]) -> list[str]:
        stranger = json.dumps({"custom_id": "nobody", "response": {"status_code": 200, "body": {}}})
        lines = [*lines, lines[0], stranger]
        random.Random(0).shuffle(lines)
        return lines

    answer_file(out, folder_of(recipe) / "results" / "any_name.jsonl", change=shuffle)
    worker = work(recipe)

    report = worker.desks[0].report
    assert states(recipe) == {"answered": 30}
    assert (report.num_answers, report.num_repeated, report.num_unknown) == (30, 1, 1)
    assert not list(folder_of(recipe).glob("*.jsonl"))


def test_running_again_without_results_writes_nothing_anew(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, batch="files")
    for _ in range(2):
        with pytest.raises(SynthesisError, match="put the files of results into"):
            work(recipe, map(make_node, range(5)))

    assert len(list(folder_of(recipe).glob("*.jsonl"))) == 1


def test_what_has_no_result_goes_out_anew_and_a_cut_file_is_told(tmp_path: Path, capsys: Any) -> None:
    recipe = make_recipe(tmp_path, batch="files")
    with pytest.raises(SynthesisError):
        work(recipe, map(make_node, range(10)))
    [out] = folder_of(recipe).glob("*.jsonl")
    answer_file(out, folder_of(recipe) / "results" / "r.jsonl", change=lambda lines: [*lines[:6], lines[6][:50]])

    seen: list[Worker] = []
    with pytest.raises(SynthesisError):
        work(recipe, prepare=seen.append)

    [again] = folder_of(recipe).glob("*.jsonl")
    assert len(list(read_keys(again))) == 4
    assert (seen[0].desks[0].report.num_answers, seen[0].desks[0].report.num_cut) == (6, 1)
    assert "6 answers, 0 refused" in capsys.readouterr().err
    assert states(recipe) == {"answered": 6, "waiting": 4}


def test_results_that_come_twice_are_paid_once(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, batch="files", price={"input": 1.0, "output": 1.0})
    with pytest.raises(SynthesisError):
        work(recipe, map(make_node, range(5)))
    [out] = folder_of(recipe).glob("*.jsonl")
    for name in ("first", "second"):
        answer_file(out, folder_of(recipe) / "results" / f"{name}.jsonl")

    worker = work(recipe)

    assert spent(recipe).num_answers == 5
    assert worker.desks[0].report.num_repeated == 5


# ---------------------------------------------------------------------------------------------- by the API


def test_the_api_takes_batches_and_gives_answers_at_their_price(tmp_path: Path, endpoint: Endpoint) -> None:
    recipe = make_recipe(tmp_path, endpoint.url, batch="api", price={"input": 1.0, "output": 1.0})

    work(recipe, map(make_node, range(40)))

    total = spent(recipe)
    assert states(recipe) == {"answered": 40}
    assert len(endpoint.api.batches) == 1
    assert total.cost == pytest.approx((total.prompt_tokens + total.completion_tokens) / 1e6 / 2)


def test_errors_of_lines_go_out_again_and_overlong_ones_fail(tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.script.faults = {"500": 0.3, "overlong": 0.2}
    recipe = make_recipe(tmp_path, endpoint.url, batch="api", limits={"max_attempts": 20})

    work(recipe, map(make_node, range(40)))

    found = states(recipe)
    assert found["answered"] + found["failed"] == 40
    assert found["failed"] > 0
    assert len(endpoint.api.batches) > 1
    assert endpoint.calls.repeated == 0


def test_a_batch_is_gone_on_with_after_a_stop(tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.script.batch_s = 3600.0
    recipe = make_recipe(tmp_path, endpoint.url, batch="api")

    async def stop(worker: Worker) -> None:
        while not endpoint.api.batches or not _remembered(recipe):
            await asyncio.sleep(0.01)
        worker.stop()

    work(recipe, map(make_node, range(20)), during=stop)
    assert states(recipe) == {"waiting": 20}
    for batch in endpoint.api.batches.values():
        batch["metadata"]["_due"] = "0"

    work(recipe)

    assert states(recipe) == {"answered": 20}
    assert len(endpoint.api.batches) == 1
    assert endpoint.calls.total == 20


def test_a_batch_made_just_before_a_kill_is_found_again(tmp_path: Path, endpoint: Endpoint) -> None:
    """Between the making of a batch and its being remembered here lies a moment in which a process can be killed."""
    endpoint.script.batch_s = 3600.0
    recipe = make_recipe(tmp_path, endpoint.url, batch="api")

    async def stop(worker: Worker) -> None:
        while not endpoint.api.batches or not _remembered(recipe):
            await asyncio.sleep(0.01)
        worker.stop()

    work(recipe, map(make_node, range(20)), during=stop)
    [state] = folder_of(recipe).glob("*.json")
    state.write_text(json.dumps(json.loads(state.read_text()) | {"batch": None}))
    for batch in endpoint.api.batches.values():
        batch["metadata"]["_due"] = "0"

    work(recipe)

    assert states(recipe) == {"answered": 20}
    assert len(endpoint.api.batches) == 1


def test_an_endpoint_without_batches_says_what_to_set(tmp_path: Path) -> None:
    with serving(batch=False) as endpoint:
        recipe = make_recipe(tmp_path, endpoint.url, batch="api")
        with pytest.raises(SynthesisError, match="set the endpoint's batch to files or no"):
            work(recipe, [make_node()])
    assert states(recipe) == {"waiting": 1}


def test_a_budget_sends_no_more_than_it_has_left(tmp_path: Path, endpoint: Endpoint) -> None:
    recipe = make_recipe(tmp_path, endpoint.url, batch="api", limits={"max_tokens": 5000})

    with pytest.raises(SynthesisError, match=r"limits.max_tokens is reached"):
        work(recipe, map(make_node, range(100)))

    total = spent(recipe)
    assert 0 < total.prompt_tokens + total.completion_tokens <= 5000
    assert states(recipe)["answered"] == endpoint.calls.total


def test_live_and_batched_endpoints_work_in_one_run(tmp_path: Path, endpoint: Endpoint) -> None:
    recipe = make_recipe(tmp_path, endpoint.url)
    batched = recipe.endpoints["writer"].model_copy(update={"batch": "api"})
    recipe = recipe.model_copy(update={"endpoints": {**recipe.endpoints, "reader": batched}})
    nodes: list[Node] = [*map(make_node, range(10)), *(make_node(n, endpoint="reader") for n in range(10, 30))]

    work(recipe, nodes)

    assert states(recipe) == {"answered": 30}
    assert len(endpoint.api.batches) == 1


def _remembered(recipe: Any) -> bool:
    return any(json.loads(path.read_text()).get("batch") for path in folder_of(recipe).glob("*.json"))


def test_a_request_is_the_same_in_a_batch_and_live(tmp_path: Path) -> None:
    client = client_of(make_recipe(tmp_path))
    request = make_request(3, answer="topics")

    [written] = write_batches([make_node(3, answer="topics")], client, tmp_path)

    assert json.loads(written.path.read_text())["body"] == client.body(request, with_schema=True)
