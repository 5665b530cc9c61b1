"""The store: what is written stays, what is derived can be derived anew, and bad times give one line."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthesis_stores import WordGate, judge_all, make_answer, make_node, make_recipe, record_answer
from ultrafuser.errors import ConfigError, DataError, SynthesisError
from ultrafuser.synthesis.queue import Failed, Finished
from ultrafuser.synthesis.recipe import SynthesisRecipe
from ultrafuser.synthesis.stages.base import ItemDraft
from ultrafuser.synthesis.storage.rows import clean
from ultrafuser.synthesis.storage.store import Store
from ultrafuser.synthesis.storage.verdicts import Verdict


@pytest.fixture
def store(tmp_path: Path):
    with Store.open(make_recipe(tmp_path)) as store:
        yield store


def kept(store: Store, *stages: str) -> list[str]:
    return [item.text for item in store.view("math").items(*stages)]


def test_a_database_is_write_ahead_logged_and_fully_synchronous(store: Store):
    pragmas = ("journal_mode", "synchronous")
    values = [store.database._connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]

    assert values == ["wal", 2]


def test_an_answer_its_cost_and_its_items_are_one_transaction(store: Store, monkeypatch):
    node = make_node()
    store.plan([node])
    store.claim({"one": 1}, now=0.0)

    def break_down(*_):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(store, "_add_spent", break_down)
    with pytest.raises(RuntimeError, match="in the middle"):
        store.record([Finished(node, make_answer(), (ItemDraft("a"),))])

    (count,) = store.progress()
    assert (count.nodes, count.items, store.spent().num_answers) == ({"claimed": 1}, {}, 0)


def test_a_node_planned_twice_at_once_is_asked_once(store: Store):
    node = make_node()

    assert store.plan([node, node]).num_new == 1
    assert store.plan([make_node()]).num_new == 0
    assert len(store.claim({"one": 5}, now=0.0)) == 1


def test_a_remembered_answer_is_read_again_without_being_paid_again(store: Store):
    node = make_node()
    record_answer(store, node, "before")
    store.rounds.forget("math", "meta_topics")
    assert (kept(store, "meta_topics"), store.next_due()) == ([], None)

    planned = store.plan([node])
    assert planned.known == ((node, make_answer()),)
    store.read_again([Finished(node, planned.known[0][1], (ItemDraft("after"),))])

    judge_all(store, "meta_topics")
    assert kept(store, "meta_topics") == ["after"]
    assert store.spent().num_answers == 1
    assert store.plan([node]).known == ()


def test_an_answer_to_a_node_that_was_forgotten_meanwhile_is_kept_without_items(store: Store):
    node = make_node()
    store.plan([node])
    store.claim({"one": 1}, now=0.0)
    store.rounds.forget("math", "meta_topics")

    store.record([Finished(node, make_answer(), (ItemDraft("late"),))])

    assert store.view("math").count("meta_topics", states=("new", "kept")) == 0
    assert [one.key for one, _ in store.plan([node]).known] == [node.key]


def test_of_two_answers_to_a_node_the_first_stays_and_both_are_paid(store: Store):
    node = make_node()
    record_answer(store, node, "first")
    store.record([Finished(node, make_answer("no"), (ItemDraft("second"), ItemDraft("third")))])

    judge_all(store, "meta_topics")
    assert kept(store, "meta_topics") == ["first"]
    assert store.spent().num_answers == 2


@given(st.text(st.characters(exclude_categories=())))
def test_cleaned_text_is_valid_and_cleaning_is_idempotent(text: str):
    cleaned = clean(text)

    assert "\0" not in cleaned
    assert clean(cleaned) == cleaned == cleaned.encode().decode()
    if "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text):
        assert cleaned == text


def test_text_of_any_kind_comes_back(store: Store):
    text = "naïve 😀 'quoted' \ud800 \0 \x1f\r\n\u2028 ${x} {{y}} %s :name"
    record_answer(store, make_node(), text)
    judge_all(store, "meta_topics")

    assert kept(store, "meta_topics") == [text.replace("\ud800", "\ufffd").replace("\0", "\ufffd")]


def test_what_a_stage_replaced_is_back_when_that_stage_is_forgotten(store: Store):
    record_answer(store, make_node(), "plain")
    judge_all(store, "meta_topics")
    (plain,) = store.view("math").items("meta_topics")
    record_answer(store, make_node(stage="sub_topics", parent=plain.key), "finer")
    store.rounds.add("math", "sub_topics", 0, 1)
    store.rounds.judge("math", "sub_topics", 0, [], lambda item: item.parent)
    assert store.view("math").item(plain.key).state == "replaced"

    store.rounds.forget("math", "sub_topics")

    assert store.view("math").item(plain.key).state == "kept"


def test_judging_is_in_the_order_of_keys_and_goes_on_in_the_middle(store: Store):
    nodes = [make_node(slot) for slot in range(30)]
    store.plan(nodes)
    store.record([Finished(node, make_answer(), (ItemDraft("a"), ItemDraft("b"))) for node in nodes])
    store.rounds.add("math", "meta_topics", 0, 30)
    gate = WordGate(("b",))

    while store.rounds.judge("math", "meta_topics", 0, [gate], lambda _: None, within_s=0.0):
        continue

    assert len(gate.asked) == 60
    assert gate.asked == sorted(gate.asked)
    assert store.rounds.of("math", "meta_topics")[0].is_judged
    (count,) = store.progress()
    assert (count.items, count.dropped) == ({"kept": 30, "dropped": 30}, {"length": 30})


def test_a_gate_that_breaks_leaves_nothing_half_judged(store: Store):
    record_answer(store, make_node(), "a", "b", "c")
    store.rounds.add("math", "meta_topics", 0, 1)

    class Broken(WordGate):
        def kept(self, *_):
            if len(self.asked) == 2:
                raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        store.rounds.judge("math", "meta_topics", 0, [Broken()], lambda _: None)

    assert store.progress()[0].items == {"new": 3}


def test_failed_nodes_are_asked_again_and_what_followed_is_derived_anew(store: Store):
    first, second = make_node(0), make_node(1)
    record_answer(store, first, "a")
    store.plan([second])
    store.claim({"one": 1}, now=0.0)
    store.record(failed=[Failed(second.key, "no")])
    judge_all(store, "meta_topics")
    (topic,) = store.view("math").items("meta_topics")
    record_answer(store, make_node(stage="sub_topics", parent=topic.key), "b")
    judge_all(store, "sub_topics")
    assert store.claim({"one": 9}, now=0.0) == []

    assert store.rounds.retry_failed("math") == 1

    assert [one.node.key for one in store.claim({"one": 9}, now=0.0)] == [second.key]
    assert store.rounds.of("math", "sub_topics") == []
    assert [one.is_judged for one in store.rounds.of("math", "meta_topics")] == [False]
    assert store.view("math").count("meta_topics", states=("new",)) == 1
    assert store.rounds.retry_failed("math") == 0


class TestVerdicts:
    @pytest.fixture(autouse=True)
    def tree(self, store: Store):
        record_answer(store, make_node(0), "a", "b")
        judge_all(store, "meta_topics")
        for item in list(store.view("math").items("meta_topics")):
            record_answer(store, make_node(stage="sub_topics", parent=item.key), f"{item.text}1", f"{item.text}2")
        judge_all(store, "sub_topics")
        self.keys = {item.text: item.key for item in store.view("math").items("meta_topics", "sub_topics")}

    def test_a_strike_drops_an_item_and_all_made_from_it(self, store: Store):
        store.plan([make_node(stage="fine_topics", parent=self.keys["a1"])])

        store.verdicts.give([Verdict(self.keys["a"], False, "too vague")])

        assert sorted(kept(store, "meta_topics", "sub_topics")) == ["b", "b1", "b2"]
        assert {count.stage: count.dropped for count in store.progress() if count.dropped} == {
            "meta_topics": {"review": 1},
            "sub_topics": {"review": 2},
        }
        assert store.claim({"one": 9}, now=0.0) == []
        assert store.verdicts.all("math") == [Verdict(self.keys["a"], False, "too vague")]

    def test_a_strike_outlives_what_is_derived_anew(self, store: Store):
        store.verdicts.give([Verdict(self.keys["b2"], False)])
        store.verdicts.give([Verdict(self.keys["a"], False)])
        store.rounds.forget("math", "meta_topics")

        self.derive_again(store)

        assert sorted(kept(store, "meta_topics", "sub_topics")) == ["b", "b1"]

    def derive_again(self, store: Store):
        nodes = [make_node(0)]
        for stage, names in (("meta_topics", "ab"), ("sub_topics", "")):
            for node, answer in store.plan(nodes).known:
                parent = "" if node.parent is None else store.view("math").item(node.parent).text
                drafts = tuple(ItemDraft(f"{parent}{name}") for name in names or "12")
                store.read_again([Finished(node, answer, drafts)])
            judge_all(store, stage)
            nodes = [
                make_node(stage="sub_topics", parent=item.key)
                for item in store.view("math").items("meta_topics", states=("kept", "dropped"))
            ]

    def test_an_item_that_is_accepted_after_all_is_judged_again(self, store: Store):
        store.plan([make_node(stage="fine_topics", parent=self.keys["a1"])])
        store.verdicts.give([Verdict(self.keys["a"], False)])
        store.verdicts.give([Verdict(self.keys["a"], True)])

        assert len(store.claim({"one": 9}, now=0.0)) == 1
        for stage in ("meta_topics", "sub_topics"):
            assert not store.rounds.of("math", stage)[0].is_judged
            judge_all(store, stage)
        assert sorted(kept(store, "meta_topics", "sub_topics")) == ["a", "a1", "a2", "b", "b1", "b2"]

    def test_a_verdict_about_nothing_is_refused_with_all_that_came_with_it(self, store: Store):
        with pytest.raises(DataError, match="item 0000, which is not there"):
            store.verdicts.give([Verdict(self.keys["a"], False), Verdict("0000", True)])

        assert store.verdicts.all("math") == []
        assert "a" in kept(store, "meta_topics")


HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from synthesis_stores import make_node, make_recipe
from ultrafuser.synthesis.storage.store import Store
store = Store.open(make_recipe(Path(sys.argv[1])))
store.plan([make_node(slot) for slot in range(10)])
store.claim({"one": 4}, now=0.0)
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_the_database_and_a_killed_one_holds_nothing(tmp_path: Path):
    command = [sys.executable, "-c", HOLD, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(
            SynthesisError, match=rf"nodes.sqlite is in use by process {process.pid} on .* since"
        ) as error:
            Store.open(make_recipe(tmp_path))
        assert "\n" not in str(error.value)
        with Store.open(make_recipe(tmp_path), read_only=True) as store:
            assert store.progress()[0].nodes == {"waiting": 6, "claimed": 4}
        process.kill()
        process.wait()

    with Store.open(make_recipe(tmp_path)) as store:
        assert store.progress()[0].nodes == {"waiting": 10}


def test_nothing_can_be_written_by_one_who_only_looks(tmp_path: Path):
    with Store.open(make_recipe(tmp_path)) as store:
        store.plan([make_node()])
    with Store.open(make_recipe(tmp_path), read_only=True) as store, pytest.raises(SynthesisError, match="readonly"):
        store.plan([make_node(1)])


def test_there_is_nothing_to_look_at_before_the_first_run(tmp_path: Path):
    with pytest.raises(SynthesisError, match="nothing was made yet"):
        Store.open(make_recipe(tmp_path), read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path):
    with Store.open(make_recipe(tmp_path)) as store:
        nodes = [make_node(slot) for slot in range(100)]
        store.plan(nodes)
        store.claim({"one": 100}, now=0.0)
        record_answer(store, nodes[0], "kept")
        pages = store.database._connection.exec_driver_sql("PRAGMA page_count").scalar()
        store.database._connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 5}")
        full = [Finished(node, make_answer("x" * 5000), (ItemDraft("lost"),)) for node in nodes[1:]]

        with pytest.raises(SynthesisError, match="full: free space and give the same command again") as error:
            store.record(full)
        assert "\n" not in str(error.value)
        assert store.progress()[0].nodes == {"answered": 1, "claimed": 99}

        store.database._connection.exec_driver_sql("PRAGMA max_page_count=1000000")
        store.record(full)
        assert store.progress()[0].nodes == {"answered": 100}
        assert store.database._connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "no SQLAlchemy URL"),
        ("mysql://user:secret@host/name", "'mysql' is not supported"),
        ("sqlite://", "SQLite wants a file"),
        ("sqlite:///:memory:", "SQLite wants a file"),
    ],
)
def test_a_database_that_cannot_be_is_one_line_without_a_password(tmp_path: Path, url: str, message: str):
    with pytest.raises(ConfigError, match=message) as error:
        Store.open(make_recipe(tmp_path, database=url))
    assert "secret" not in str(error.value)


def test_a_server_that_is_not_there_is_one_line_without_a_password(tmp_path: Path):
    with pytest.raises(SynthesisError, match=r"127\.0\.0\.1") as error:
        Store.open(make_recipe(tmp_path, database="postgresql://user:secret@127.0.0.1:9/name"))
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_database_is_one_line(tmp_path: Path):
    (tmp_path / "nodes.sqlite").write_bytes(b"certainly not a database, although long enough " * 100)

    with pytest.raises(SynthesisError, match="not a database: the file is damaged"):
        Store.open(make_recipe(tmp_path))


def test_a_database_of_another_version_is_refused(tmp_path: Path):
    Store.open(make_recipe(tmp_path)).close()
    with sqlite3.connect(tmp_path / "nodes.sqlite") as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE name = 'version'")

    with pytest.raises(SynthesisError, match="made by another version"):
        Store.open(make_recipe(tmp_path))
    with pytest.raises(SynthesisError, match="made by another version"):  # and not: in use
        Store.open(make_recipe(tmp_path))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")

    with pytest.raises(SynthesisError, match="choose another folder"):
        Store.open(make_recipe(tmp_path / "file"))


def test_keys_and_passwords_are_nowhere_in_the_run_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with Store.open(make_recipe(tmp_path, url="http://user:hidden-word@127.0.0.1:9/v1")) as store:
        record_answer(store, make_node(), "a")

    for path in tmp_path.iterdir():
        assert b"sk-very-secret" not in path.read_bytes()
        assert b"hidden-word" not in path.read_bytes()


def test_claims_take_no_longer_among_many_nodes(store: Store):
    """A claim follows an index: it must not sort or look through all that waits."""
    plan = store.database._connection.exec_driver_sql(
        "EXPLAIN QUERY PLAN SELECT * FROM node WHERE state = 'waiting' AND planned = 1 AND endpoint = 'one' "
        "AND not_before <= 1 ORDER BY key LIMIT 9"
    ).all()

    assert "USING INDEX node_to_ask" in str(plan)
    assert "TEMP B-TREE" not in str(plan)


def test_nodes_of_other_domains_are_left_alone(store: Store):
    store.plan([make_node(0), make_node(1, domain="code")])

    store.restrict(["code"])

    assert [one.node.domain for one in store.claim({"one": 9}, now=time.time())] == ["code"]
    assert store.next_due() is None


def test_a_recipe_is_needed_for_its_place_alone(tmp_path: Path):
    recipe: SynthesisRecipe = make_recipe(tmp_path / "deep" / "er")

    Store.open(recipe).close()

    assert (tmp_path / "deep" / "er" / "nodes.sqlite").exists()
