"""Review: which items a person sees, and that the store honours what was said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from synthesis_samples import Grower, grow, sample_recipe
from ultrafuser.errors import ConfigError, DataError
from ultrafuser.synthesis.dataset.records import read_synthesis
from ultrafuser.synthesis.dataset.review import (
    ItemVerdict,
    StageApproval,
    VerdictFile,
    apply_verdicts,
    approve_stages,
    check_stages,
    read_verdicts,
    sample_items,
    write_review,
)
from ultrafuser.synthesis.recipe import SynthesisRecipe
from ultrafuser.synthesis.storage.schema import item
from ultrafuser.synthesis.storage.store import Store


@pytest.fixture
def recipe(tmp_path: Path) -> SynthesisRecipe:
    return sample_recipe(tmp_path / "run", "text")


@pytest.fixture
def store(recipe: SynthesisRecipe) -> Iterator[Store]:
    with Store.open(recipe) as opened:
        grow(opened, "text", metas=3, subs=5, instructions=6)
        yield opened


def verdicts(*said: tuple[str, str], approved: tuple[StageApproval, ...] = ()) -> VerdictFile:
    given = tuple(ItemVerdict.model_validate({"item": item, "verdict": verdict}) for item, verdict in said)
    return VerdictFile(synthesis="sample", verdicts=given, approved=approved)


def test_topics_take_turns(store: Store):
    """Fifteen sub-topics, each with as many weakly related instructions: none is shown twice before all were once."""
    view = store.view("text")

    once = sample_items(view, "weak", 15)
    twice = sample_items(view, "weak", 30)

    assert set(Counter(item.parent for item in once).values()) == {1}
    assert set(Counter(item.parent for item in twice).values()) == {2}
    assert [item.key for item in twice[:15]] == [item.key for item in once]


def test_rewritten_instructions_are_drawn_by_topic_as_well(store: Store):
    sample = sample_items(store.view("text"), "complicated", 15)
    topics = [store.view("text").lineage(item)[1].key for item in sample]

    assert len(set(topics)) == 15


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), size=st.integers(1, 30))
def test_a_sample_is_as_large_as_can_be_and_no_topic_is_ahead(
    sizes: list[int], size: int, tmp_path_factory: pytest.TempPathFactory
):
    recipe = sample_recipe(tmp_path_factory.mktemp("store"), "text")
    with Store.open(recipe) as store:
        grower = Grower(store)
        for number, count in enumerate(sizes):
            topic = grower.add("text", "meta_topics", f"Topic {number}")
            for index in range(count):
                grower.add("text", "sub_topics", f"Sub {number}.{index}", topic)
        grower.flush()
        sample = sample_items(store.view("text"), "sub_topics", size)
        there = store.view("text").count_by_parent("sub_topics")

    drawn = Counter(item.parent for item in sample)
    assert len({item.key for item in sample}) == len(sample) == min(size, sum(sizes))
    most = max(drawn.values())
    assert all(drawn[topic] >= min(count, most - 1) for topic, count in there.items())


def test_the_page_is_the_same_whenever_it_is_written(store: Store, recipe: SynthesisRecipe, tmp_path: Path):
    sections = write_review(store, recipe, tmp_path / "one.html", size=10)
    write_review(store, recipe, tmp_path / "two.html", size=10)

    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    shown = [(section.stage, len(section.items), section.total) for section in sections]
    assert shown == [
        ("meta_topics", 3, 3),
        ("sub_topics", 10, 15),
        ("instructions", 10, 15),
        ("strong", 10, 30),
        ("weak", 10, 30),
        ("complicated", 10, 15),
    ]


def test_a_struck_topic_takes_with_it_all_that_was_made_from_it(store: Store, recipe: SynthesisRecipe):
    view = store.view("text")
    topic = sample_items(view, "sub_topics", 1)[0]
    meta = view.lineage(topic)[0]

    applied = apply_verdicts(store, recipe, verdicts((topic.key, "strike"), (meta.key, "accept")))

    left = list(read_synthesis(store, "text", language="en"))
    assert (applied.accepted, applied.struck) == (1, 1)
    assert len(left) == 14 * 6
    assert topic.text not in {record.sub_topic for record in left}
    assert all(item.parent != topic.key for item in view.items("instructions", "strong", "weak"))


def test_a_struck_rewrite_leaves_its_original(tmp_path: Path):
    recipe = sample_recipe(tmp_path / "run", "text")
    with Store.open(recipe) as store:
        grower = Grower(store)
        seed = grower.add("text", "instructions", "Explain tides.", state="replaced")
        rewrite = grower.add("text", "complicated", "Explain tides to a sailor who is lost.", seed)
        grower.flush()
        with store.database.transaction():
            store.database.write(update(item).where(item.c.key == seed).values(replaced_by=rewrite))
        apply_verdicts(store, recipe, verdicts((rewrite, "strike")))

        assert store.view("text").item(rewrite).state == "dropped"
        assert store.view("text").item(seed).state == "kept"


def test_a_page_written_again_shows_what_was_said(store: Store, recipe: SynthesisRecipe, tmp_path: Path):
    before = write_review(store, recipe, tmp_path / "page.html", stages=["sub_topics"], size=6)[0]
    struck, accepted = before.items[0].item, before.items[1].item
    file = VerdictFile(
        synthesis="sample",
        verdicts=(
            ItemVerdict(item=struck.key, verdict="strike", note="too broad"),
            ItemVerdict(item=accepted.key, verdict="accept"),
        ),
    )
    apply_verdicts(store, recipe, file)

    after = write_review(store, recipe, tmp_path / "page.html", stages=["sub_topics"], size=6)[0]

    assert [shown.item.key for shown in after.items] == [shown.item.key for shown in before.items]
    assert (after.items[0].verdict, after.items[0].note) == ("strike", "too broad")
    assert after.items[1].verdict == "accept"
    assert after.items[2].verdict is None


def test_approval_by_the_page_or_by_name_lets_the_pipeline_go_on(store: Store, recipe: SynthesisRecipe):
    assert not store.verdicts.is_finished("text", "sub_topics")
    apply_verdicts(store, recipe, verdicts(approved=(StageApproval(domain="text", stage="sub_topics"),)))
    approve_stages(store, recipe, ["meta_topics"])

    assert store.verdicts.is_finished("text", "sub_topics")
    assert store.verdicts.is_finished("text", "meta_topics")
    assert not store.verdicts.is_finished("text", "instructions")


def test_verdicts_about_something_else_are_refused_whole(store: Store, recipe: SynthesisRecipe):
    topic = next(store.view("text").items("sub_topics"))
    other = VerdictFile(synthesis="another")

    with pytest.raises(DataError, match="of synthesis 'another', and the recipe is 'sample'"):
        apply_verdicts(store, recipe, other)
    with pytest.raises(DataError, match="is not there"):
        apply_verdicts(store, recipe, verdicts((topic.key, "strike"), ("0" * 32, "strike")))
    with pytest.raises(DataError, match="domain 'music', which the recipe does not have"):
        apply_verdicts(
            store,
            recipe,
            verdicts((topic.key, "strike"), approved=(StageApproval(domain="music", stage="sub_topics"),)),
        )
    assert store.view("text").item(topic.key).state == "kept"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no verdicts.json of a review page: the file"),
        ('{"synthesis": "a", "verdicts": [{"item": "k", "verdict": "maybe"}]}', r"verdicts\.0\.verdict"),
        ('{"synthesis": "a", "more": 1}', "more: Extra inputs"),
    ],
)
def test_a_file_that_is_none_says_so_in_one_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "verdicts.json"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(DataError, match=message) as caught:
        read_verdicts(path)
    assert "\n" not in str(caught.value)


def test_only_stages_of_topics_and_instructions_are_reviewed():
    assert check_stages(["weak", "meta_topics"]) == ("meta_topics", "weak")
    with pytest.raises(ConfigError, match="'responses' is none that is reviewed"):
        check_stages(["responses"])


def test_nothing_to_review_is_said(tmp_path: Path):
    recipe = sample_recipe(tmp_path / "run")
    with Store.open(recipe) as store, pytest.raises(DataError, match="no topic or instruction to review yet"):
        write_review(store, recipe, tmp_path / "page.html")
