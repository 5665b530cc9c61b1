"""The data set in numbers: they are what counting by hand gives, with or without a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthesis_samples import Grower, grow, sample_recipe
from ultrafuser.drawing import figures
from ultrafuser.errors import DataError, ModelError
from ultrafuser.synthesis.dataset import diversity
from ultrafuser.synthesis.dataset.diversity import Sample, find_diversity
from ultrafuser.synthesis.dataset.measure import _quantile, token_counter
from ultrafuser.synthesis.dataset.stats import StatsOptions, write_stats
from ultrafuser.synthesis.recipe import SynthesisRecipe
from ultrafuser.synthesis.storage.store import Store


@pytest.fixture
def recipe(tmp_path: Path) -> SynthesisRecipe:
    return sample_recipe(tmp_path / "run")


@pytest.fixture
def store(recipe: SynthesisRecipe) -> Iterator[Store]:
    with Store.open(recipe) as opened:
        grow(opened, "text")
        grow(opened, "code", metas=1)
        yield opened


def by_domain(texts: Sequence[str]) -> np.ndarray:
    """An embedding that knows the domain and nearly nothing else."""
    return np.array(
        [[1.0 if "text" in text else 0.0, 0.0 if "text" in text else 1.0, len(text) / 1e4] for text in texts]
    )


def test_the_table_counts_what_is_there(store: Store, recipe: SynthesisRecipe, tmp_path: Path):
    page = write_stats(store, recipe, tmp_path / "stats")
    stats = json.loads((tmp_path / "stats" / "stats.json").read_text(encoding="utf-8"))
    text, code = stats["domains"]

    assert (text["records"], code["records"]) == (24, 12)
    assert text["relations"] == {"complicated": 8, "strong": 8, "weak": 8}
    assert text["meta_topics"] == {"text area 0": 12, "text area 1": 12}
    assert (text["sub_topics"], text["records_per_sub_topic"]) == (8, [3, 3, 3])
    assert text["turns"] == pytest.approx(1 + 8 / 24)
    # "Answer to m.s.i:" and 5 to 7 words and a dot that stands alone; a third of the records has three more words.
    assert text["response"]["mean"] == pytest.approx((8 * (9 + 10 + 11) + 8 * 3) / 32)
    assert "| text | 24 | 2 / 8 |" in page
    assert "| text | sub_topics | refusals | 2 | as an ai (2) |" in page
    assert (tmp_path / "stats" / "stats.md").read_text(encoding="utf-8") == page


def test_lengths_are_in_tokens_of_a_given_tokenizer(store: Store, recipe: SynthesisRecipe, tmp_path: Path):
    def count_characters(texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]

    page = write_stats(store, recipe, tmp_path / "stats", StatsOptions(count_characters, "characters"))
    stats = json.loads((tmp_path / "stats" / "stats.json").read_text(encoding="utf-8"))

    assert stats["unit"] == "characters"
    assert stats["domains"][1]["instruction"]["longest"] == len(
        "Explain code point 0.0.0 to a colleague who asks about xxx. Name limits."
    )
    assert "characters per conversation" in page


def test_pictures_are_drawn_and_the_same_twice(store: Store, recipe: SynthesisRecipe, tmp_path: Path):
    options = StatsOptions(embed=by_domain, by="a test")
    for name in ("one", "two"):
        write_stats(store, recipe, tmp_path / name, options)

    for picture in ("lengths.png", "topics.png", "map.png"):
        first = (tmp_path / "one" / picture).read_bytes()
        assert first.startswith(b"\x89PNG")
        assert first == (tmp_path / "two" / picture).read_bytes()


def test_without_a_model_words_are_compared_and_it_says_so(store: Store, recipe: SynthesisRecipe, tmp_path: Path):
    page = write_stats(store, recipe, tmp_path / "stats")

    assert "TF-IDF of words: no model was given" in page


def test_without_the_plotting_packages_there_are_numbers_all_the_same(
    store: Store, recipe: SynthesisRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(figures, "find_spec", lambda _: None)
    monkeypatch.setattr(diversity, "find_spec", lambda _: None)
    page = write_stats(store, recipe, tmp_path / "stats")

    assert "Diversity and map need scikit-learn: pip install 'ultrafuser[plots]'" in page
    assert "| text | 24 |" in page
    assert sorted(path.name for path in (tmp_path / "stats").iterdir()) == ["stats.json", "stats.md"]


def test_domains_that_are_apart_have_a_silhouette_near_one():
    texts = {"text": [f"text {'x' * n}" for n in range(6)], "code": [f"code {'x' * n}" for n in range(6)]}
    found, places = find_diversity(texts, embed=by_domain, by="a test")

    assert found.silhouette == pytest.approx(1.0, abs=0.01)
    assert Counter(place.domain for place in places) == {"text": 6, "code": 6}


def test_nearest_neighbours_are_those_of_a_double_loop():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(12, 5))
    names = [str(number) for number in range(12)]

    found, _ = find_diversity({"a": names}, embed=lambda texts: vectors[[int(text) for text in texts]], by="a test")

    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    distances = [min(1 - unit[i] @ unit[j] for j in range(12) if j != i) for i in range(12)]
    assert found.domains[0].mean_distance == pytest.approx(np.mean(distances))
    assert found.domains[0].near == pytest.approx(np.mean([distance < 0.1 for distance in distances]))
    assert found.silhouette is None


def test_copies_are_near_by_words_and_different_texts_are_not():
    same = find_diversity({"a": ["bake a bread", "bake a bread", "Bake a bread"]})[0].domains[0]
    other = find_diversity({"a": ["bake bread", "prove primes", "sort lists"]})[0].domains[0]

    assert (same.mean_distance, same.near) == (pytest.approx(0.0, abs=1e-9), 1.0)
    assert (other.mean_distance, other.near) == (pytest.approx(1.0), 0.0)


@pytest.mark.parametrize(
    "texts", [{}, {"a": []}, {"a": ["one"]}, {"a": ["one"], "b": ["two"]}, {"a": ["x", "x"], "b": ["x", "x"]}]
)
def test_few_texts_are_no_error(texts: dict[str, list[str]]):
    found, places = find_diversity(texts)

    assert len(found.domains) == sum(len(some) > 1 for some in texts.values())
    assert len(places) in (0, 4)


@given(order=st.permutations([f"key{number}" for number in range(30)]), size=st.integers(1, 40))
def test_a_sample_does_not_depend_on_the_order(order: list[str], size: int):
    samples = []
    for keys in (order, sorted(order)):
        sample = Sample(size)
        for key in keys:
            sample.add(key, f"text of {key}")
        samples.append(sample.texts())

    assert samples[0] == samples[1]
    assert len(samples[0]) == min(size, 30)


@given(lengths=st.lists(st.integers(0, 50), min_size=1), share=st.sampled_from([0.05, 0.5, 0.95]))
def test_quantiles_of_a_histogram_are_those_of_its_values(lengths: list[int], share: float):
    expected = float(np.quantile(lengths, share, method="inverted_cdf"))

    assert _quantile(Counter(lengths), share) == expected


def test_a_place_without_a_tokenizer_is_one_line(tmp_path: Path):
    with pytest.raises(ModelError, match="no tokenizer could be loaded from") as caught:
        token_counter(tmp_path)
    assert "\n" not in str(caught.value)


def test_nothing_made_yet_is_said(tmp_path: Path):
    recipe = sample_recipe(tmp_path / "run")
    with Store.open(recipe) as store, pytest.raises(DataError, match="nothing to count"):
        write_stats(store, recipe, tmp_path / "stats")


def test_names_with_signs_of_markdown_and_mathematics_stay_names(tmp_path: Path):
    recipe = sample_recipe(tmp_path / "run", "text")
    with Store.open(recipe) as store:
        grower = Grower(store)
        meta = grower.add("text", "meta_topics", "Prices | $x_1$ <b>")
        topic = grower.add("text", "sub_topics", "In $US and $AU", meta)
        for number in range(4):
            seed = grower.add("text", "instructions", f"What does {number} $ buy?", topic)
            grower.add("text", "responses", "Little.", seed)
        grower.drop("text", "responses", "no", seed, "length", "a | b < c")
        grower.flush()
        page = write_stats(store, recipe, tmp_path / "stats")

    assert r"a \| b &lt; c (1)" in page
