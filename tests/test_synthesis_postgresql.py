"""The store on a real PostgreSQL: the same behaviour, and several workers on one database."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from synthesis_endpoint import serving
from synthesis_postgresql import programs, serving_postgresql
from synthesis_stores import WordGate, judge_all, make_answer, make_node, make_recipe, record_answer
from ultrafuser.errors import SynthesisError
from ultrafuser.synthesis.pipeline import prepare, run_synthesis
from ultrafuser.synthesis.queue import Failed, Finished, Postponed
from ultrafuser.synthesis.stages.base import ItemDraft
from ultrafuser.synthesis.storage.schema import metadata
from ultrafuser.synthesis.storage.store import Store
from ultrafuser.synthesis.storage.verdicts import Verdict

pytestmark = pytest.mark.skipif(programs() is None, reason="PostgreSQL is not installed (Debian: postgresql)")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving_postgresql() as url:
        yield url


@pytest.fixture
def recipe(server: str, tmp_path: Path) -> Iterator[Any]:
    yield make_recipe(tmp_path, database=server)
    engine = sqlalchemy.create_engine(server)
    metadata.drop_all(engine)
    engine.dispose()


def test_nodes_are_planned_claimed_answered_and_judged_as_in_sqlite(recipe):
    with Store.open(recipe) as store:
        nodes = [make_node(slot) for slot in range(20)]
        assert store.plan(nodes).num_new == 20
        claimed = store.claim({"one": 15}, now=5.0)
        keys = [one.node.key for one in claimed]
        assert keys == sorted(node.key for node in nodes)[:15]
        drafts = (ItemDraft("a\0\ud800", {"x": "\0"}), ItemDraft("b"))
        store.record(
            [Finished(one.node, make_answer("\0 \ud800"), drafts) for one in claimed[:9]],
            [Postponed(claimed[9].node.key, 50.0, "busy")],
            [Failed(claimed[10].node.key, "no")],
        )
        store.release([one.node.key for one in claimed[11:]])
        (count,) = store.progress()
        assert count.nodes == {"answered": 9, "waiting": 10, "failed": 1}
        assert store.next_due() == 0.0
        assert store.spent().cost == 9 * 0.25

        judge_all(store, "meta_topics", gates=[WordGate(("b",))])

        assert [item.text for item in store.view("math").items("meta_topics")] == ["a\ufffd\ufffd"] * 9
        assert store.rounds.retry_failed("math") == 1
        store.rounds.forget("math", "meta_topics")
        assert len(store.plan(nodes).known) == 9


def test_bands_verdicts_and_lineages_work_as_in_sqlite(recipe):
    with Store.open(recipe) as store:
        record_answer(store, make_node(), "a", "b")
        bands = (0, 2**63, 2**64 - 1)

        class Banding(WordGate):
            def judge(self, _, context):
                return "near" if context.bands.candidates("all", bands) else None

            def kept(self, item, context):
                context.bands.add("all", item, bands)

        judge_all(store, "meta_topics", gates=[Banding()])
        (topic,) = store.view("math").items("meta_topics")
        record_answer(store, make_node(stage="sub_topics", parent=topic.key), "c")
        judge_all(store, "sub_topics")
        (finer,) = store.view("math").items("sub_topics")
        assert [item.key for item in store.view("math").lineage(finer)] == [topic.key, finer.key]

        store.verdicts.give([Verdict(topic.key, False)])

        assert {count.stage: count.dropped for count in store.progress()} == {
            "meta_topics": {"length": 1, "review": 1},
            "sub_topics": {"review": 1},
        }


def test_two_workers_never_claim_the_same_node(recipe):
    with Store.open(recipe) as one, Store.open(recipe) as two:
        one.plan([make_node(slot) for slot in range(30)])

        first, second = one.claim({"one": 20}, now=0.0), two.claim({"one": 20}, now=0.0)

        assert len(first) == 20
        assert len(second) == 10
        assert not {c.node.key for c in first} & {c.node.key for c in second}


def test_a_claim_of_a_worker_that_is_gone_can_be_taken_and_its_late_answer_changes_nothing(recipe):
    with Store.open(recipe) as gone, Store.open(recipe) as other:
        node = make_node()
        gone.plan([node])
        gone.claim({"one": 1}, now=0.0)
        other.renew()
        assert other.claim({"one": 1}, now=0.0) == []
        with other.database.transaction() as connection:  # two minutes pass
            connection.exec_driver_sql("UPDATE node SET lease_until = lease_until - 121")

        other.renew()
        assert len(other.claim({"one": 1}, now=0.0)) == 1
        gone.record(postponed=[Postponed(node.key, 99.0, "too late")])
        assert other.progress()[0].nodes == {"claimed": 1}
        other.record([Finished(node, make_answer(), (ItemDraft("first"),))])
        gone.record([Finished(node, make_answer("late"), (ItemDraft("second"),))])

        judge_all(other, "meta_topics")
        assert [item.text for item in other.view("math").items("meta_topics")] == ["first"]
        assert other.spent().num_answers == 2


def test_a_lease_that_is_renewed_does_not_end(recipe):
    with Store.open(recipe) as slow, Store.open(recipe) as other:
        slow.plan([make_node()])
        slow.claim({"one": 1}, now=0.0)
        with other.database.transaction() as connection:
            connection.exec_driver_sql("UPDATE node SET lease_until = lease_until - 121")

        slow.renew()
        other.renew()

        assert other.progress()[0].nodes == {"claimed": 1}


def test_one_worker_leads_until_it_is_gone(recipe):
    with Store.open(recipe) as other:
        with Store.open(recipe) as leader:
            assert leader.try_to_lead()
            assert not other.try_to_lead()
            assert leader.try_to_lead()
        time.sleep(0.2)  # the server notices
        assert other.try_to_lead()


def test_nothing_is_forgotten_under_the_hands_of_another_worker(recipe):
    with Store.open(recipe) as leader, Store.open(recipe) as other:
        assert leader.try_to_lead()

        with pytest.raises(SynthesisError, match="another worker plans on this database: stop all workers"):
            prepare(other, [], from_stage="meta_topics")


@pytest.mark.slow
def test_two_worker_processes_make_one_data_set(recipe, tmp_path: Path):
    """Several workers on one database server: every node is asked exactly once."""
    script = Path(__file__).with_name("synthesis_runs.py")
    with serving(latency_s=0.05) as endpoint:
        shared = make_recipe(tmp_path, url=endpoint.url, database=recipe.database, endpoint={"concurrency": 8})
        (tmp_path / "recipe.json").write_text(shared.model_dump_json())
        command = [sys.executable, str(script), str(tmp_path / "recipe.json"), "1000"]
        workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        outputs = [worker.communicate(timeout=50)[0] for worker in workers]

        assert [worker.returncode for worker in workers] == [0, 0]
        assert endpoint.calls.total == len(endpoint.calls.answered) == 1000
        assert endpoint.calls.most_at_once > 8, "both asked"
    with Store.open(shared) as store:
        (count,) = store.progress()
        assert (count.nodes, count.items) == ({"answered": 1000}, {"kept": 1000})
        shares = [row.num_answers for row in store.database.rows(sqlalchemy.select(metadata.tables["spent"]))]
        assert sum(shares) == 1000
        assert len(shares) == 2
        assert min(shares) > 100
    assert all("in all 1000, " in output for output in outputs)


@pytest.mark.slow
def test_the_same_data_set_comes_from_postgresql_and_sqlite(recipe, tmp_path: Path):
    settings = {"meta_topics": 2, "sub_topics": 4, "records": 10}
    with serving() as endpoint:
        recipes = [
            make_recipe(tmp_path / name, url=endpoint.url, domains={"cooking": {"settings": settings}}, database=url)
            for name, url in (("server", recipe.database), ("file", None))
        ]
        found = []
        for one in recipes:
            run_synthesis(one)
            with Store.open(one) as store:
                stages = ("meta_topics", "sub_topics", "instructions", "strong", "weak", "complicated", "responses")
                states = ("kept", "dropped", "replaced")
                found.append(list(store.view("cooking").items(*stages, states=states)))

    assert len(found[0]) > 30
    assert found[0] == found[1]


def test_a_server_that_goes_away_is_one_line(tmp_path: Path):
    with serving_postgresql() as url:
        store = Store.open(make_recipe(tmp_path, database=url))
        store.plan([make_node()])
    with pytest.raises(SynthesisError) as error:
        store.plan([make_node(1)])
    assert "\n" not in str(error.value)
    store.close()
