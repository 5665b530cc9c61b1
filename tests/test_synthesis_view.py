"""What stages and gates read: the right items in the order of (round, key), however many there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthesis_stores import judge_all, make_answer, make_node, make_recipe, record_answer
from ultrafuser.errors import DataError
from ultrafuser.synthesis.node import Item
from ultrafuser.synthesis.queue import Finished
from ultrafuser.synthesis.recipe import StageName
from ultrafuser.synthesis.stages.base import ItemDraft
from ultrafuser.synthesis.storage.store import Store
from ultrafuser.synthesis.storage.view import StoreBands, StoreGateContext


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(make_recipe(tmp_path)) as store:
        yield store


def fill(store: Store, stage: StageName, number: int, *, rounds: int = 1, parent: str | None = None) -> None:
    """So many kept items of a stage in each round."""
    for round_ in range(rounds):
        nodes = [make_node(slot, stage=stage, round=round_, parent=parent) for slot in range(number)]
        store.plan(nodes)
        store.record([Finished(node, make_answer(), (ItemDraft(f"{stage} {node.slot}"),)) for node in nodes])
        judge_all(store, stage, round_)


def in_order(items: list[Item]) -> list[Item]:
    return sorted(items, key=lambda item: (item.round, item.key))


def test_items_come_in_order_over_many_pages(store: Store):
    fill(store, "meta_topics", 620, rounds=2)

    items = list(store.view("math").items("meta_topics"))

    assert len(items) == 1240
    assert items == in_order(items)
    assert store.view("math").count("meta_topics") == 1240


def test_items_of_several_stages_and_states_are_one_order(store: Store):
    fill(store, "meta_topics", 5, rounds=2)
    fill(store, "sub_topics", 5, rounds=2)
    record_answer(store, make_node(99, stage="sub_topics"), "new one")

    items = list(store.view("math").items("sub_topics", "meta_topics", states=("new", "kept")))

    assert len(items) == 21
    assert items == in_order(items)


def test_items_are_read_while_others_are_written(store: Store):
    """Planning pages through items while answers come in: no cursor stays open, and new items are not yet there."""
    fill(store, "meta_topics", 1000)
    seen = 0
    for item in store.view("math").items("meta_topics"):
        if seen % 100 == 0:
            record_answer(store, make_node(seen, stage="sub_topics", parent=item.key), "child")
        seen += 1

    assert seen == 1000
    assert store.view("math").count("sub_topics", states=("new",)) == 10


def test_parents_children_and_lineages(store: Store):
    fill(store, "meta_topics", 3)
    first, second, third = store.view("math").items("meta_topics")
    fill(store, "sub_topics", 2, parent=first.key)
    fill(store, "sub_topics", 4, parent=second.key)
    view = store.view("math")

    assert view.count_by_parent("sub_topics") == {first.key: 2, second.key: 4}
    assert [item.parent for item in view.items("sub_topics", parent=second.key)] == [second.key] * 4
    assert [item.key for item in view.without_child("meta_topics", child="sub_topics")] == [third.key]
    child = next(view.items("sub_topics", parent=first.key))
    fill(store, "instructions", 1, parent=child.key)
    (leaf,) = view.items("instructions")
    assert view.lineage(leaf) == [first, child, leaf]
    assert view.lineage(first) == [first]

    context = StoreGateContext(store.database, "math")
    assert context.parent(leaf) == child
    assert context.parent(first) is None
    assert context.siblings(first) == [second, third]
    assert context.siblings(child) == [item for item in view.items("sub_topics", parent=first.key) if item != child]
    assert context.finish_reason(leaf) == "stop"


def test_a_child_that_was_dropped_is_none(store: Store):
    fill(store, "meta_topics", 1)
    (topic,) = store.view("math").items("meta_topics")
    record_answer(store, make_node(stage="sub_topics", parent=topic.key), "new")

    assert list(store.view("math").without_child("meta_topics", child="sub_topics")) == [topic]


def test_a_domain_sees_its_own_items_alone(store: Store):
    fill(store, "meta_topics", 1)
    (topic,) = store.view("math").items("meta_topics")

    assert store.view("code").count("meta_topics") == 0
    with pytest.raises(DataError, match=f"domain code has no item {topic.key}"):
        store.view("code").item(topic.key)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("xy"), st.sets(st.integers(0, 2**64 - 1) | st.sampled_from((0, 1)), max_size=4)),
        max_size=6,
    ),
    st.sampled_from("xy"),
    st.sets(st.integers(0, 2**64 - 1) | st.sampled_from((0, 1)), max_size=4),
)
def test_candidates_are_all_kept_items_of_a_scope_with_a_band_in_common(tmp_path_factory, added, scope, wanted):
    with Store.open(make_recipe(tmp_path_factory.mktemp("bands"))) as store:
        fill(store, "meta_topics", len(added))
        items = list(store.view("math").items("meta_topics"))
        bands = StoreBands(store.database, "math")
        with store.database.transaction():
            for item, (its_scope, its_bands) in zip(items, added, strict=True):
                bands.add(its_scope, item, sorted(its_bands))
                bands.add(its_scope, item, sorted(its_bands))
        alike = [item for item, (s, b) in zip(items, added, strict=True) if s == scope and b & wanted]

        assert bands.candidates(scope, sorted(wanted)) == sorted(alike, key=lambda item: item.key)
        assert StoreBands(store.database, "code").candidates(scope, sorted(wanted)) == []


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM item WHERE domain = 'math' AND stage = 's' AND state = 'kept' AND (round, key) > (0, 'a') "
        "ORDER BY round, key LIMIT 9",
        "SELECT count(*) FROM item WHERE domain = 'math' AND stage = 's' AND state IN ('kept', 'new')",
        "SELECT * FROM item WHERE parent = 'p' AND stage = 's' AND state = 'kept'",
    ],
)
def test_reading_follows_an_index(store: Store, query: str):
    plan = str(store.database._connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}").all())

    assert "SEARCH item USING" in plan
    assert "INDEX item_" in plan
    assert "TEMP B-TREE" not in plan
