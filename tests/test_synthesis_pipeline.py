"""The pipeline: rounds, gates and reviews in order; the same data set whatever comes in between."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from synthesis_endpoint import Endpoint, serving
from synthesis_stores import CountingStage, WordGate, make_plan, make_recipe
from ultrafuser.errors import ConfigError, SynthesisError
from ultrafuser.synthesis.course import DomainPlan
from ultrafuser.synthesis.node import Item
from ultrafuser.synthesis.pipeline import Pipeline, plan_domains, prepare, run_synthesis
from ultrafuser.synthesis.recipe import SynthesisRecipe
from ultrafuser.synthesis.storage.store import Store
from ultrafuser.synthesis.storage.verdicts import Verdict
from ultrafuser.synthesis.summary import Summary

SMALL = {"meta_topics": 2, "sub_topics": 4, "records": 12, "gates": {"responses": {"truncated": None}}}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as endpoint:
        yield endpoint


def run(recipe: SynthesisRecipe, *plans: DomainPlan, **how: Any) -> Summary:
    """As `run_synthesis`, with plans of our own."""
    with Store.open(recipe) as store:
        prepare(store, plans, **how)
        return asyncio.run(Pipeline(recipe, store, plans).run())


def items(recipe: SynthesisRecipe, *domains: str) -> list[Item]:
    """Every item, in an order of its own."""
    states = ("new", "kept", "dropped", "replaced")
    stages = ("meta_topics", "sub_topics", "fine_topics", "instructions", "strong", "weak", "complicated", "responses")
    with Store.open(recipe, read_only=True) as store:
        return [item for name in domains or ("math",) for item in store.view(name).items(*stages, states=states)]


def test_stages_are_asked_in_rounds_and_each_builds_on_what_was_kept(tmp_path: Path, endpoint: Endpoint):
    recipe = make_recipe(tmp_path, url=endpoint.url)
    topics = CountingStage("meta_topics", 2, max_rounds=3)
    finer = CountingStage("sub_topics", 1, of="meta_topics", num_words=1)

    summary = run(recipe, make_plan(topics, finer))

    assert summary.is_complete
    assert [(count.stage, count.nodes, count.items) for count in summary.counts] == [
        ("meta_topics", {"answered": 6}, {"kept": 18}),
        ("sub_topics", {"answered": 18}, {"kept": 18}),
    ]
    assert summary.num_answers == summary.spent.num_answers == endpoint.calls.total == 24


def test_a_complete_run_asks_and_reads_nothing_more(tmp_path: Path, endpoint: Endpoint):
    recipe = make_recipe(tmp_path, url=endpoint.url)
    run(recipe, make_plan(CountingStage("meta_topics", 3)))
    stage = CountingStage("meta_topics", 3)

    summary = run(recipe, make_plan(stage))

    assert (summary.num_answers, endpoint.calls.total, stage.reads) == (0, 3, [])


def test_a_mended_reader_needs_no_call(tmp_path: Path, endpoint: Endpoint):
    """The issue: raw answers are kept, so a parser fix needs no new call."""
    recipe = make_recipe(tmp_path, url=endpoint.url)
    broken = CountingStage("meta_topics", 3, num_words=0)
    summary = run(recipe, make_plan(broken))
    assert summary.counts[0].nodes == {"unreadable": 3}

    summary = run(recipe, make_plan(CountingStage("meta_topics", 3)), from_stage="meta_topics")

    assert (summary.counts[0].nodes, summary.counts[0].items) == ({"answered": 3}, {"kept": 9})
    assert (endpoint.calls.total, summary.spent.num_answers) == (3, 3)


def test_from_a_stage_on_only_what_was_never_asked_is_asked(tmp_path: Path, endpoint: Endpoint):
    recipe = make_recipe(tmp_path, url=endpoint.url)
    topics, finer = CountingStage("meta_topics", 2), CountingStage("sub_topics", 1, of="meta_topics")
    run(recipe, make_plan(topics, finer))
    first = items(recipe)
    assert endpoint.calls.total == 2 + 6

    run(recipe, make_plan(CountingStage("meta_topics", 3), finer), from_stage="meta_topics")

    assert endpoint.calls.total == 2 + 6 + 1 + 3
    assert {item.key for item in first} < {item.key for item in items(recipe)}


def test_what_gates_drop_is_built_on_by_nobody(tmp_path: Path, endpoint: Endpoint):
    recipe = make_recipe(tmp_path, url=endpoint.url)
    topics, finer = CountingStage("meta_topics", 4, num_words=2), CountingStage("sub_topics", 1, of="meta_topics")
    gate = WordGate(("e",))

    summary = run(recipe, make_plan(topics, finer, gates={"meta_topics": [gate]}))

    dropped = [item for item in items(recipe) if item.state == "dropped"]
    assert dropped
    assert all((item.gate, item.reason) == ("length", "a word that goes") for item in dropped)
    assert summary.counts[1].nodes == {"answered": 8 - len(dropped)}


def test_a_stage_can_take_the_place_of_what_it_was_made_from(tmp_path: Path, endpoint: Endpoint):
    recipe = make_recipe(tmp_path, url=endpoint.url)
    finer = CountingStage("sub_topics", 1, of="meta_topics", num_words=1, replaces=True)
    last = CountingStage("fine_topics", 1, of="sub_topics", num_words=1)

    summary = run(recipe, make_plan(CountingStage("meta_topics", 2), finer, last))

    assert [count.items for count in summary.counts] == [{"replaced": 6}, {"kept": 6}, {"kept": 6}]


@pytest.mark.slow
def test_two_runs_are_the_same_whatever_order_answers_come_in(tmp_path: Path):
    """Other concurrency, other delays, faults, and a stop in the middle: the same items in the same states."""
    settings = {"domains": {name: {"settings": SMALL} for name in ("cooking", "math")}}
    with serving() as endpoint:
        calm = make_recipe(tmp_path / "calm", url=endpoint.url, endpoint={"concurrency": 1}, **settings)
        run_synthesis(calm)
    with serving(latency_per_request_s=0.002, faults={"503": 0.03, "reset": 0.03}, retry_after="0") as endpoint:
        wild = make_recipe(tmp_path / "wild", url=endpoint.url, endpoint={"concurrency": 16}, **settings)
        stop_after(wild, 20)
        assert not run_synthesis(wild).num_failed

    first, second = items(calm, "cooking", "math"), items(wild, "cooking", "math")
    assert len(first) > 60
    assert [vars_of(item) for item in first] == [vars_of(item) for item in second]


def vars_of(item: Item) -> tuple[Any, ...]:
    return (item.key, item.parent, item.stage, item.round, item.text, item.detail, item.state, item.gate, item.reason)


def stop_after(recipe: SynthesisRecipe, num_answers: int) -> None:
    """A run that is stopped after so many answers."""
    plans = plan_domains(recipe)

    class Stopper:
        num_recorded = 0

        def start(self, counts: Sequence[Any]) -> None:
            """Nothing to do."""

        def recorded(self, recorded: Any) -> None:
            self.num_recorded += len(recorded.finished)
            if self.num_recorded >= num_answers:
                pipeline.stop()

    with Store.open(recipe) as store:
        prepare(store, plans)
        pipeline = Pipeline(recipe, store, plans, Stopper())
        summary = asyncio.run(pipeline.run())
    assert summary.was_stopped
    assert not any(count.nodes.get("claimed") for count in summary.counts)


def test_a_domain_waits_until_a_person_has_looked_at_it(tmp_path: Path, endpoint: Endpoint):
    recipe = make_recipe(tmp_path, url=endpoint.url, review_after=["meta_topics"])
    topics, finer = CountingStage("meta_topics", 2), CountingStage("sub_topics", 1, of="meta_topics", num_words=1)

    for _ in range(2):
        summary = run(recipe, make_plan(topics, finer))
        assert summary.to_review == (("math", "meta_topics"),)
        assert "math waits until a person has looked at its meta_topics" in summary.text()
        assert endpoint.calls.total == 2
    with Store.open(recipe) as store:
        struck = next(store.view("math").items("meta_topics"))
        store.verdicts.give([Verdict(struck.key, False, "not this")])
        store.verdicts.finish("math", "meta_topics")

    summary = run(recipe, make_plan(topics, finer))
    assert summary.is_complete
    assert [item.parent == struck.key for item in items(recipe) if item.stage == "sub_topics"] == [False] * 5

    # The strike holds when all is derived anew.
    summary = run(recipe, make_plan(topics, finer), from_stage="meta_topics")
    assert summary.counts[0].dropped == {"review": 1}
    assert endpoint.calls.total == 7


def test_what_was_given_up_is_asked_again_on_demand(tmp_path: Path, endpoint: Endpoint):
    recipe = make_recipe(tmp_path, url=endpoint.url, limits={"max_attempts": 1})
    endpoint.script.faults = {"400": 0.5}
    plan = make_plan(CountingStage("meta_topics", 12, num_words=1), CountingStage("sub_topics", 1, of="meta_topics"))
    summary = run(recipe, plan)
    num_failed = summary.counts[0].nodes["failed"]
    assert 0 < num_failed < 12
    assert f"{summary.num_failed} requests were given up: --retry-failed asks them again" in summary.text()
    endpoint.script.faults = {}
    assert run(recipe, plan).num_answers == 0

    summary = run(recipe, plan, retry_failed=True)

    assert summary.num_failed == 0
    assert [count.nodes for count in summary.counts] == [{"answered": 12}] * 2


class TestChangedRecipes:
    @pytest.fixture(autouse=True)
    def small_run(self, tmp_path: Path, endpoint: Endpoint):
        self.folder, self.url = tmp_path, endpoint.url
        run_synthesis(self.recipe())

    def recipe(self, endpoint: Any = None, settings: Any = None, **more: Any) -> SynthesisRecipe:
        domains = {"cooking": {"settings": SMALL | (settings or {})}, **more.pop("domains", {})}
        return make_recipe(self.folder, url=self.url, endpoint=endpoint or {}, domains=domains, **more)

    @pytest.mark.parametrize(
        ("change", "stage", "what"),
        [
            ({"seed": 5}, "meta_topics", "seed has changed from 0 to 5"),
            ({"stages": {"sub_topics": {"temperature": 0.5}}}, "sub_topics", "temperature has changed from 1.0 to 0.5"),
            ({"endpoint": {"model": "other"}}, "meta_topics", 'models has changed from ["scripted"] to ["other"]'),
            ({"settings": {"records": 13}}, "instructions", "settings.records has changed from 12 to 13"),
            ({"settings": {"fine_topics": 8}}, "instructions", "settings.fine_topics"),
            ({"settings": {"complicated": 0.0}}, "complicated", "there is no such stage any more"),
            ({"settings": {"gates": {"responses": {"truncated": {}}}}}, "responses", "settings.gates.responses"),
        ],
    )
    def test_what_planned_stages_depend_on_is_refused(self, change: Any, stage: str, what: str):
        with pytest.raises(ConfigError) as error:
            run_synthesis(self.recipe(**change))

        message = str(error.value)
        assert f"domain cooking: since {stage} was planned, " in message
        assert what in message
        assert f"go on with --from {stage}" in message
        assert "\n" not in message

    def test_what_is_refused_goes_on_from_the_stage_that_is_named(self):
        run_synthesis(self.recipe(settings={"records": 13}), from_stage="instructions")

        assert run_synthesis(self.recipe(settings={"records": 13})).num_answers == 0

    def test_a_changed_prompt_is_refused(self, tmp_path_factory):
        from ultrafuser.synthesis.scaffold import new_domain

        folder = new_domain("mine", like="cooking", to=tmp_path_factory.mktemp("domains"))
        domains = {"mine": {"folder": str(folder), "settings": SMALL}}
        run_synthesis(self.recipe(domains=domains), only=("mine",))
        with (folder / "sub_topics.md").open("a") as file:
            file.write("\nBe brief.\n")

        with pytest.raises(ConfigError, match=r"domain mine: since sub_topics was planned, the prompt sub_topics\.md"):
            run_synthesis(self.recipe(domains=domains))

    @pytest.mark.parametrize(
        "change",
        [
            {"limits": {"max_cost": 5.0}},
            {"endpoint": {"concurrency": 3, "price": {"input": 1.0}, "timeout_s": 10.0}},
            {"export": {"name": "another"}},
            {"review_after": ["responses"]},
            {"domains": {"math": {"settings": SMALL}}},
            {"settings": {"expected_tokens": {"responses": 5}}},
            {"settings": {"follow_ups": {"share": 0.5}}},  # more stages, behind all that is planned
        ],
    )
    def test_what_changes_no_plan_passes(self, change: Any):
        run_synthesis(self.recipe(**change), only=("cooking",))


@pytest.mark.slow
def test_only_the_domains_that_are_named_are_gone_on_with(tmp_path: Path, endpoint: Endpoint):
    recipe = make_recipe(tmp_path, url=endpoint.url, domains={n: {"settings": SMALL} for n in ("cooking", "math")})
    stop_after(recipe, 3)

    summary = run_synthesis(recipe, only=("cooking",))

    complete = {count.domain for count in summary.counts if count.stage == "responses"}
    assert complete == {"cooking"}
    run_synthesis(recipe)
    assert {item.domain for item in items(recipe, "cooking", "math") if item.stage == "responses"} == {
        "cooking",
        "math",
    }


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"from_stage": "topics"}, "--from topics: there is no such stage; known: meta_topics, "),
        ({"only": ("maths",)}, "--only maths: the recipe has no such domain; known: cooking"),
    ],
)
def test_names_that_are_none_are_refused_before_anything_is_asked(
    tmp_path: Path, endpoint: Endpoint, how: Any, message: str
):
    recipe = make_recipe(tmp_path, url=endpoint.url, domains={"cooking": {"settings": SMALL}})

    with pytest.raises(ConfigError) as error:
        run_synthesis(recipe, **how)

    assert message in str(error.value)
    assert endpoint.calls.total == 0


def test_a_budget_ends_the_run_in_one_line_and_what_was_answered_is_kept(tmp_path: Path, endpoint: Endpoint):
    recipe = make_recipe(tmp_path, url=endpoint.url, limits={"max_tokens": 1000})

    with pytest.raises(SynthesisError, match="max_tokens") as error:
        run(recipe, make_plan(CountingStage("meta_topics", 200)))

    assert "\n" not in str(error.value)
    with Store.open(recipe, read_only=True) as store:
        spent = store.spent()
        assert 0 < spent.num_answers == endpoint.calls.total
        assert spent.prompt_tokens + spent.completion_tokens <= 1000


def test_a_bug_in_a_stage_ends_the_run_with_its_own_error(tmp_path: Path, endpoint: Endpoint):
    class Broken(CountingStage):
        def plan(self, view, round):
            yield from list(super().plan(view, round))[:3]
            raise ZeroDivisionError("in the plan")

    recipe = make_recipe(tmp_path, url=endpoint.url)
    with pytest.raises(ZeroDivisionError, match="in the plan"):
        run(recipe, make_plan(Broken("meta_topics", 5)))

    summary = run(recipe, make_plan(CountingStage("meta_topics", 5)))
    assert summary.counts[0].nodes == {"answered": 5}
    assert endpoint.calls.repeated == 0


def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_loses_no_answer(tmp_path: Path, endpoint: Endpoint):
    recipe = make_recipe(tmp_path, url=endpoint.url, endpoint={"concurrency": 4})
    stage = CountingStage("meta_topics", 120)
    with Store.open(recipe) as store:
        prepare(store, [make_plan(stage)])
        store.plan(list(stage.plan(store.view("math"), 0)))
        pages = store.database._connection.exec_driver_sql("PRAGMA page_count").scalar()
        store.database._connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 5}")
        with pytest.raises(SynthesisError, match="free space and give the same command again") as error:
            asyncio.run(Pipeline(recipe, store, [make_plan(stage)]).run())
        assert 0 < store.spent().num_answers < 120
    assert "\n" not in str(error.value)

    assert run(recipe, make_plan(stage)).counts[0].nodes == {"answered": 120}
    assert endpoint.calls.repeated <= 4


def test_a_signal_ends_a_run_well(tmp_path: Path):
    with serving(latency_s=0.3) as endpoint:
        recipe = make_recipe(tmp_path, url=endpoint.url, endpoint={"concurrency": 4})
        (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
        program = (
            "import sys\nfrom pathlib import Path\nfrom ultrafuser.synthesis.pipeline import run_synthesis\n"
            "from ultrafuser.synthesis.recipe import SynthesisRecipe\n"
            "recipe = SynthesisRecipe.model_validate_json(Path(sys.argv[1]).read_text())\n"
            "print(run_synthesis(recipe).text())\n"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "recipe.json")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while endpoint.calls.total < 2 and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=30)

        assert process.returncode == 0, errors
        assert "stopped; the same command goes on" in output
        with Store.open(recipe, read_only=True) as store:
            assert store.spent().num_answers == endpoint.calls.total
            assert not any(count.nodes.get("claimed") for count in store.progress())


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path: Path, endpoint: Endpoint):
    recipe = make_recipe(tmp_path, url=endpoint.url, domains={"cooking": {"settings": SMALL}})
    summaries: list[Summary] = []
    thread = threading.Thread(target=lambda: summaries.append(run_synthesis(recipe)))

    thread.start()
    thread.join()

    assert summaries[0].is_complete
