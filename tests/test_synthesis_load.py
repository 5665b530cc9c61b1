"""Recipes of a synthesis: read with overrides and variables, and refused in one clear line."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from ultrafuser.errors import ConfigError
from ultrafuser.synthesis.load import load_synthesis

RECIPE = """
name: mine
endpoints:
  strong: {url: "${URL}", model: big, price: {input: 1.5, output: 6}}
  local: {url: [http://one/v1, http://two/v1], model: small}
stages:
  default: {endpoint: strong, temperature: 0.7}
  responses: {endpoint: [strong, local], max_tokens: 4000}
domains:
  math:
  own: {folder: prompts/own}
benchmarks: tests_here
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("URL", "http://somewhere/v1")
    (tmp_path / "prompts" / "own").mkdir(parents=True)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_is_read_with_variables_overrides_and_paths(path: Path):
    recipe = load_synthesis(path, ["limits.max_cost=5", "domains.math.settings.records=10", "stages.strong.top_p=0.9"])

    assert recipe.endpoints["strong"].urls == ("http://somewhere/v1",)
    assert recipe.endpoints["local"].urls == ("http://one/v1", "http://two/v1")
    assert recipe.limits.max_cost == 5
    assert recipe.domains["math"].settings == {"records": 10}
    assert recipe.domains["own"].folder == path.parent / "prompts" / "own"
    assert recipe.benchmarks == Path("tests_here"), "it is not beside the recipe"
    assert recipe.run_folder == Path("runs/mine")
    sampling = recipe.sampling("responses")
    assert (sampling.endpoint, sampling.temperature, sampling.max_tokens) == (("strong", "local"), 0.7, 4000)
    assert recipe.sampling("strong").top_p == 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.topics.temperature=1", "stages.topics: there is no stage 'topics'; known: meta_topics, sub_topics"),
        ("review_after=[topics]", "review_after: there is no stage 'topics'"),
        ("stages.weak.endpoint=nobody", "stage weak asks endpoint 'nobody', which is not there; known: strong, local"),
        ("endpoints.strong.modle=x", "endpoints.strong.modle: Extra inputs are not permitted"),
        ("limits.max_cost=-1", "limits.max_cost: Input should be greater than 0 (got -1)"),
        ("domains=null", "domains: "),
        ("domains={}", "domains: "),
        ("endpoints={}", "endpoints: "),
        ("name=", "name: "),
        ("stages=5", "stages: "),
        ("review_after=sub_topics", "review_after: "),
        ("endpoints.strong", "--set 'endpoints.strong': write KEY=VALUE"),
        ("name=${NOT_SET}", "the environment variable NOT_SET is not set"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_place(path: Path, change: str, message: str):
    with pytest.raises(ConfigError) as error:
        load_synthesis(path, [change])

    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- a list", "a: [", "just words", "", "\x00"])
def test_what_is_no_recipe_is_one_line(tmp_path: Path, text: str):
    (tmp_path / "recipe.yaml").write_text(dedent(text))

    with pytest.raises(ConfigError, match=r"recipe\.yaml") as error:
        load_synthesis(tmp_path / "recipe.yaml")
    assert "\n" not in str(error.value)


def test_a_recipe_that_is_not_there_is_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match="no recipe at"):
        load_synthesis(tmp_path / "none.yaml")


def test_recipes_are_frozen(path: Path):
    recipe: Any = load_synthesis(path)

    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "another"
