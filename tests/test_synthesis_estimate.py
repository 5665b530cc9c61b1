"""A run on paper: numbers that follow from the recipe, checked against sums made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from synthesis_endpoint import serving
from synthesis_helpers import make_node, make_recipe, work
from ultrafuser.synthesis.domain import Domain, load_domain
from ultrafuser.synthesis.estimate import FIRST_TOKEN_S, TOKENS_PER_S, estimate, estimate_domains
from ultrafuser.synthesis.load import load_synthesis
from ultrafuser.synthesis.queue import Spent
from ultrafuser.synthesis.recipe import DomainConfig, SynthesisRecipe

RECIPE = Path(__file__).parent.parent / "recipes" / "ultrachat2.yaml"


@pytest.fixture
def text() -> Domain:
    return load_domain("text", DomainConfig())


def stage_of(found: Any, name: str, domain: str = "text") -> Any:
    return next(stage for stage in found.stages if (stage.domain, stage.stage) == (domain, name))


def test_the_paper_run_comes_out_with_its_counts(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("ULTRACHAT_URL", "http://localhost:8000/v1")
    monkeypatch.setenv("ULTRACHAT_MODEL", "m")
    prices = ["endpoints.writer.price.input=2.5", "endpoints.writer.price.output=10", f"folder={tmp_path}"]

    found = estimate(load_synthesis(RECIPE, prices))

    records = [stage.num_items for stage in found.stages if stage.stage == "responses"]
    assert records == [100_000, 100_000, 110_000]
    assert stage_of(found, "sub_topics", "code").num_items == 407
    assert 400_000 < found.num_calls < 600_000
    assert found.cost == pytest.approx(
        sum(s.prompt_tokens * 2.5 + s.completion_tokens * 10 for s in found.stages) / 1e6
    )
    table = found.table()
    assert "responses" in table
    assert "100,000" in table
    assert f"{found.cost:,.2f}" in table


def test_money_and_hours_follow_from_tokens_and_limits(tmp_path: Path, text: Domain) -> None:
    price = {"input": 2.0, "output": 8.0}
    recipe = make_recipe(tmp_path, price=price, concurrency=10, requests_per_minute=100.0, tokens_per_minute=50_000.0)

    stage = stage_of(estimate_domains(recipe, [text]), "responses")

    assert stage.cost == pytest.approx((stage.prompt_tokens * 2 + stage.completion_tokens * 8) / 1e6)
    answer_s = FIRST_TOKEN_S + stage.completion_tokens / stage.num_calls / TOKENS_PER_S
    by = [stage.num_calls * answer_s / 10 / 3600, stage.num_calls / 100 / 60, stage.tokens / 50_000 / 60]
    assert stage.hours == pytest.approx(max(by), rel=0.01)


def test_the_narrowest_limit_decides(tmp_path: Path, text: Domain) -> None:
    fast = estimate_domains(make_recipe(tmp_path, concurrency=1000), [text])
    slow = estimate_domains(make_recipe(tmp_path, concurrency=1000, requests_per_minute=10.0), [text])

    assert stage_of(slow, "responses").hours == pytest.approx(stage_of(slow, "responses").num_calls / 600)
    assert slow.hours > fast.hours


def test_a_batch_costs_its_factor(tmp_path: Path, text: Domain) -> None:
    price = {"input": 2.0, "output": 8.0}
    live = estimate_domains(make_recipe(tmp_path, price=price), [text])
    batched = estimate_domains(make_recipe(tmp_path, price=price, batch="api", batch_price_factor=0.25), [text])

    assert batched.cost == pytest.approx(live.cost / 4)
    assert any("By batches" in note for note in batched.notes)


def test_measured_means_take_the_place_of_expectations_once_there_are_enough(tmp_path: Path, text: Domain) -> None:
    few = {("text", "responses"): Spent(5, 500, 5000, 0.0)}
    enough = {("text", "responses"): Spent(100, 10_000, 100_000, 0.0)}
    recipe = make_recipe(tmp_path)

    expected = stage_of(estimate_domains(recipe, [text], few), "responses")
    measured = stage_of(estimate_domains(recipe, [text], enough), "responses")

    assert (expected.is_measured, expected.num_done) == (False, 5)
    assert (measured.is_measured, measured.num_done) == (True, 100)
    assert measured.completion_tokens == measured.num_calls * 1000
    assert measured.prompt_tokens == measured.num_calls * 100


def test_answers_in_the_store_are_what_is_measured(tmp_path: Path) -> None:
    with serving() as endpoint:
        recipe = make_recipe(tmp_path, endpoint.url)
        work(recipe, map(make_node, range(40)))

    stage = stage_of(estimate(recipe), "responses")

    assert (stage.num_done, stage.is_measured) == (40, True)
    assert "measured" in estimate(recipe).table()


def test_nothing_is_written_or_asked(tmp_path: Path) -> None:
    estimate(make_recipe(tmp_path / "run"))

    assert not (tmp_path / "run").exists()


def test_a_limit_that_would_end_the_run_is_told(tmp_path: Path, text: Domain) -> None:
    recipe = make_recipe(tmp_path, price={"input": 1.0, "output": 1.0}, limits={"max_cost": 0.5, "max_tokens": 100})

    notes = " ".join(estimate_domains(recipe, [text]).notes)

    assert "limits.max_cost is 0.5: the run will end there" in notes
    assert "limits.max_tokens is 100" in notes


def test_an_endpoint_without_a_price_is_told(tmp_path: Path, text: Domain) -> None:
    assert any("counted as free: writer" in note for note in estimate_domains(make_recipe(tmp_path), [text]).notes)


def test_domains_share_an_endpoint_and_not_two(tmp_path: Path, text: Domain) -> None:
    recipe = make_recipe(tmp_path, requests_per_minute=100.0)
    again = Domain("math", text.settings, text.prompts)
    both: SynthesisRecipe = recipe.model_copy(update={"domains": {"text": DomainConfig(), "math": DomainConfig()}})

    assert estimate_domains(both, [text, again]).hours == pytest.approx(2 * estimate_domains(recipe, [text]).hours)
